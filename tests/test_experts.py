"""The experts: one suite over every implementation that runs here, against `reference.py`; relative RMS error."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import Quantized, dequantize, experts, gpu, int4, quantize
from m1jax.kernels.experts.cases import CASES, ExpertsCase
from m1jax.kernels.experts.gpu import route
from m1jax.kernels.experts.order import by_bucket
from m1jax.kernels.gpu.case import reduced
from tests import tools
from tests.tools import compare_case, normal, rms_error

IMPLEMENTATIONS: tuple[Any, ...] = ("xla", "triton_interpreted")
TOLERANCE = tools.TOLERANCE | {"float32": 3e-6}  # two products, one after the other
L, E, F, M = 2, 6, 96, 256  # int4 groups of 32 and 128; F is no multiple of the tiles


@functools.cache
def weights_of(dtype: str) -> Any:
    """gate_up and down in a float dtype, or quantised."""
    w13, w2 = normal(1, L, E, 2, F, M) / np.sqrt(M), normal(2, L, E, M, F) / np.sqrt(F)
    if dtype in ("int8", "int4"):
        return quantize(w13, dtype), quantize(w2, dtype)
    return w13.astype(dtype), w2.astype(dtype)


def routing(N: int, k: int, skew: bool, experts: int = E) -> Any:
    """Experts of each token, every third without any; with skew one expert has most tokens and some have none."""
    rng = np.random.default_rng(N)
    scores = rng.standard_normal((N, experts))
    if skew:
        scores += 9.0 * (np.arange(experts) == 1) - 99.0 * (np.arange(experts) >= experts - 2)
    chosen = np.argsort(-scores)[:, :k].astype(np.int32)
    if N > 2:
        chosen[N // 2 :: 3] = experts
    return jnp.asarray(chosen), jnp.asarray(rng.random((N, k), dtype=np.float32))


@jax.jit
def exact(x: jax.Array, weights: Any, *args: Any) -> jax.Array:
    """The reference on the numbers that the weights stand for, in float32 throughout."""
    w13, w2 = map(dequantize, weights)
    return experts(x.astype(jnp.float32), w13, w2, *args, layer=1, implementation="reference")


@pytest.mark.parametrize("stored", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("N", "k", "skew"), [(1, 2, False), (8, 2, True), (200, 2, True)])
def test_forward(N: int, k: int, skew: bool, dtype: str, stored: str) -> None:
    x, weights = normal(0, N, M, dtype=dtype), weights_of(dtype if stored == "float" else stored)
    args = routing(N, k, skew)
    want = exact(x, weights, *args)
    for implementation in IMPLEMENTATIONS:
        run: Any = jax.jit(functools.partial(experts, layer=1, implementation=implementation))
        got = run(x, *weights, *args)
        assert got.dtype == jnp.float32
        assert rms_error(got, want) < TOLERANCE[dtype], implementation
        if N > 2:
            assert not np.any(got[N // 2 :: 3])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8", "int4"])
def test_gradients(stored: str) -> None:
    N, x = 40, normal(0, 40, M, dtype="bfloat16" if stored == "bfloat16" else "float32")
    quantized = stored in ("int8", "int4")
    chosen, share = routing(N, 2, True)
    into = normal(5, N, M)

    def loss(how: str, x: jax.Array, share: jax.Array, weights: Any) -> jax.Array:
        if how == "reference":
            return jnp.vdot(into, exact(x, weights, chosen, share))
        return jnp.vdot(into, experts(x, weights[0], weights[1], chosen, share, layer=1, implementation=how))  # pyright: ignore

    def gradients(how: str) -> list[jax.Array]:
        of = jax.grad(functools.partial(loss, how), argnums=(0, 1) if quantized else (0, 1, 2))
        return jax.tree.leaves(jax.jit(of)(x, share, weights_of(stored)))

    wanted = gradients("reference")
    for implementation in IMPLEMENTATIONS:
        for got, want in zip(gradients(implementation), wanted, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert rms_error(got, want) < (1e-5 if x.dtype == jnp.float32 else 1.5e-2), implementation


# Few tokens that are trained on: the form that multiplies single rows writes nothing for a backward pass.
SINGLE = [
    dataclasses.replace(case, name=f"gradients {case.name}", grad=True, dtype="bfloat16")
    for case in reduced(CASES)
    if case.N == 1 and case.kind
]


@pytest.mark.parametrize("case", [*reduced(CASES), *SINGLE], ids=lambda case: case.name)
def test_cases(case: ExpertsCase) -> None:
    """The shapes that are timed and compiled, fewer channels, experts and tokens of them."""
    compare_case(case, ("xla", "triton_interpreted"), 1e-5 if case.dtype == "float32" else 8e-3)


def tiled(tiles: gpu.Tiles, stored: str, N: int) -> None:
    """Experts of N tokens with one choice of tiles are right; only the second product's sum is split."""
    weights, x = weights_of(stored), normal(0, N, M, dtype="bfloat16")
    chosen, shares = routing(N, 2, False)
    bits = gpu.bits_of(weights[0])
    form = gpu.default_form(1, E, x.dtype, (bits, bits), True)
    form = dataclasses.replace(form, gate_up=dataclasses.replace(tiles, split=1), down=tiles, both=None)
    got = jax.jit(functools.partial(gpu.experts, form=form))(x, *weights, 1, chosen, shares)
    assert rms_error(got, exact(x, weights, chosen, shares)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("stored", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("tiles", [(16, 64, 128, 4, 3), (16, 64, 128, 4, 3, 3), (128, 128, 64, 8, 1)])
def test_tiles_of_many_rows(tiles: tuple[int, ...], stored: str) -> None:
    """Those of prefill and of decode, whichever finds the rows, and an uneven split of the sum."""
    tiled(gpu.Tiles(*tiles), stored, 140)


@pytest.mark.parametrize("tiles", [(1, 16, 512, 2, 1), (1, 16, 128, 2, 1, 3), (1, 64, 64, 4, 1)])
def test_tiles_of_single_rows(tiles: tuple[int, ...]) -> None:
    """More in-channels at once than there are, an uneven split, more out-channels than there are."""
    tiled(gpu.Tiles(*tiles), "int8", 3)


@pytest.mark.parametrize(
    ("rows", "width", "F", "split"), [(8, 64, 96, 1), (8, 128, 192, 2), (16, 64, 384, 2), (8, 32, 32, 3)]
)
def test_int4_weights_of_few_rows(rows: int, width: int, F: int, split: int) -> None:
    """Groups of 32, 64 and 128, uneven splits of the sum, more parts than groups; x whose mean is not 0."""
    w13, w2 = (quantize(normal(i, L, E, *shape), "int4") for i, shape in ((1, (2, F, M)), (2, (M, F))))
    chosen, _ = routing(40, 2, True)
    x = (normal(3, 40, M) + 0.5).astype(jnp.bfloat16)
    layer, flat = jnp.ones(1, jnp.int32), chosen.reshape(-1)
    valid = flat < E
    tiles = gpu.Tiles(rows, width, w13.group, 4, 4)
    h = int4.Arranged(*int4.product(tiles, int4.arranged(x, w13.group), w13, layer, chosen, True, w2))
    both = jnp.einsum("npfm,nm->npf", dequantize(w13)[1, flat], x.repeat(2, 0).astype(jnp.float32))
    exact_h = (jax.nn.silu(both[:, 0]) * both[:, 1]).astype(jnp.bfloat16)
    want = int4.arranged(exact_h, w2.group)
    assert rms_error(h.x[valid], want.x[valid]) < 1e-3  # where it is rounded the other way

    def of_groups(a: jax.Array) -> jax.Array:
        return a.astype(jnp.float32).reshape(len(a), F // w2.group, -1).sum(-1)[valid]

    assert rms_error(of_groups(h.sums), of_groups(h.x)) < 1e-6
    tiles = gpu.Tiles(rows, width, w2.group, 4, 4, split)
    (y,) = int4.product(tiles, want, w2, layer, chosen, True)
    exact_y = jnp.einsum("nmf,nf->nm", dequantize(w2)[1, flat], exact_h.astype(jnp.float32))
    assert rms_error(y.sum(0)[valid], exact_y[valid]) < 1e-5


def test_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHUNK", 16)
    x, weights, args = normal(0, 37, M), weights_of("float32"), routing(37, 2, False)
    run: Any = jax.jit(functools.partial(experts, layer=1, implementation="triton_interpreted"))
    got = run(x, *weights, *args)
    assert rms_error(got, exact(x, weights, *args)) < TOLERANCE["float32"]


def test_gradients_over_many_chunks_are_rounded_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bfloat16 they would lose a digit more with every few chunks."""
    x, weights, args = normal(0, 512, M), weights_of("bfloat16"), routing(512, 2, False)

    def gradients(dtype: Any) -> Any:
        cast: Any = jax.tree.map(lambda w: w.astype(dtype), weights)

        def loss(weights: Any) -> jax.Array:
            y = experts(x.astype(dtype), *weights, *args, layer=1, implementation="triton_interpreted")
            return jnp.sum(y * jnp.cos(jnp.arange(M)))

        return jax.jit(jax.grad(loss))(cast)

    want, once = gradients(jnp.float32), gradients(jnp.bfloat16)
    monkeypatch.setattr(gpu, "CHUNK", 16)
    for ours, whole, exact_one in zip(gradients(jnp.bfloat16), once, want, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert rms_error(ours, exact_one) < 1.2 * rms_error(whole, exact_one)


@pytest.mark.parametrize("skew", [False, True])
def test_route(skew: bool) -> None:
    """Every assignment is in one tile of its expert, and the programs of a span are those of its tiles."""
    N, R, blocks = 500, 16, 3
    chosen, _ = routing(N, 2, skew)
    order, table, bounds = (np.asarray(a) for a in jax.jit(route, static_argnums=(1, 2))(chosen, E, R))
    flat = np.asarray(chosen).reshape(-1)
    seen: list[int] = []
    for expert, first, count, _, _ in table:
        rows = order[first : first + count]
        assert np.all(flat[rows] == expert) and count <= R
        seen += list(rows)
    assert sorted(seen) == list(np.flatnonzero(flat < E))
    assert np.array_equal(np.diff(bounds), np.bincount(flat, minlength=E + 1)[:E])
    visited = set()
    for program in range(len(table) * blocks):
        start, size = table[program // blocks][3:]
        local = program - start * blocks
        assert 1 <= size <= gpu.SPAN and table[start + local % size][0] == table[start][0]
        visited.add((start + local % size, local // size))
    assert visited == {(tile, block) for tile in range(len(table)) for block in range(blocks)}


def test_what_the_kernels_cannot_do_is_named() -> None:
    args = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    narrow = quantize(jnp.ones((1, 2, 2, 8, 32)), "int4"), quantize(jnp.ones((1, 2, 32, 8)), "int4")
    with pytest.raises(ValueError, match="down has int4 groups of 8"):
        experts(jnp.ones((1, 32)), *narrow, *args, implementation="triton_interpreted")
    odd = [Quantized(jnp.zeros((*s, 48), jnp.uint8), jnp.ones((*s, 2))) for s in ((1, 2, 2, 96), (1, 2, 96))]
    with pytest.raises(ValueError, match="gate_up has int4 groups of 48"):
        experts(jnp.ones((1, 96)), *odd, *args, implementation="triton_interpreted")  # pyright: ignore
    wide = jnp.ones((1, 2, 2, 8, 32)), jnp.ones((1, 2, 32, 8))
    with pytest.raises(ValueError, match="'triton' cannot run: needs a CUDA device"):
        experts(jnp.ones((1, 32)), *wide, *args, implementation="triton")
    with pytest.raises(ValueError, match="unknown 'cuda'"):
        experts(jnp.ones((1, 32)), *wide, *args, implementation="cuda")  # pyright: ignore[reportArgumentType]
    assert isinstance(narrow[0], Quantized)


def test_a_traced_layer_out_of_range_touches_no_other_memory() -> None:
    x, weights, args = normal(0, 3, M), weights_of("float32"), routing(3, 2, False)

    @jax.jit
    def call(layer: jax.Array) -> Any:
        def out(x: jax.Array) -> jax.Array:
            return experts(x, *weights, *args, layer=layer, implementation="triton_interpreted")

        return jax.value_and_grad(lambda x: jnp.sum(out(x)))(x)

    for layer, taken in ((-1, 0), (L, L - 1)):
        assert all(map(np.array_equal, call(jnp.asarray(layer)), call(jnp.asarray(taken))))


@pytest.mark.parametrize("N", [8, 200])
def test_numbers_that_are_no_experts_choose_nobody(N: int) -> None:
    x, (w13, w2) = normal(0, N, M), weights_of("float32")
    chosen, shares = routing(N, 2, False)
    want = exact(x, (w13, w2), chosen, shares)
    strange = np.array(chosen)
    strange[strange == E] = np.resize([-1, E + 1, -(2**31), 2**31 - 1, 99], np.sum(strange == E))
    for implementation in (*IMPLEMENTATIONS, "reference"):
        run: Any = jax.jit(functools.partial(experts, layer=1, implementation=implementation))
        got = run(x, w13, w2, jnp.asarray(strange), shares)
        assert rms_error(got, want) < TOLERANCE["float32"], implementation


def test_the_share_of_nobody_counts_nothing() -> None:
    x, (w13, w2) = normal(0, 8, M), weights_of("float32")
    chosen, shares = routing(8, 2, False)
    want = exact(x, (w13, w2), chosen, shares)
    shares = jnp.where(chosen == E, jnp.nan, shares)
    for implementation in (*IMPLEMENTATIONS, "reference"):
        got = experts(x, w13, w2, chosen, shares, layer=1, implementation=implementation)
        assert rms_error(got, want) < TOLERANCE["float32"], implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arrays_of_numpy(implementation: Any) -> None:
    x, weights, args = normal(0, 5, M), weights_of("float32"), routing(5, 2, False)
    given: Any = tuple(map(np.asarray, (x, *weights, *args)))
    got = experts(*given, layer=1, implementation=implementation)
    assert rms_error(got, exact(x, weights, *args)) < TOLERANCE["float32"]


def test_bad_arguments_are_named() -> None:
    x, (w13, w2), picks = normal(0, 2, M), weights_of("float32"), routing(2, 2, False)
    chosen, shares = picks

    def int4(groups: int, width: int = 6) -> Quantized:
        return Quantized(jnp.zeros((L, E, 2, F, width // 2), jnp.uint8), jnp.ones((L, E, 2, F, groups)))

    half = [w.astype(jnp.float16) for w in (w13, w2)]
    bad: list[tuple[str, Any]] = [
        (r"gate_up: expected \[L", lambda: experts(x, w13[0], w2, chosen, shares)),
        ("down: expected", lambda: experts(x, w13, w2[:1], chosen, shares)),
        ("layer: expected 0 to 1, got 2", lambda: experts(x, w13, w2, chosen, shares, layer=L)),
        ("chosen: expected integers", lambda: experts(x, w13, w2, chosen[:1], shares)),
        ("chosen: expected integers .* got a list", lambda: experts(x, w13, w2, [[0, 1]] * 2, shares)),  # pyright: ignore
        ("x: expected float32 or bfloat16", lambda: experts(x.astype(jnp.float16), half[0], half[1], chosen, shares)),
        ("x: expected", lambda: experts(chosen, w13, w2, chosen, shares)),
        ("chosen: expected integers", lambda: experts(x, w13, w2, chosen.astype(jnp.float32), shares)),
        ("weights: expected float32", lambda: experts(x, w13, w2, chosen, shares.astype(jnp.bfloat16))),
        ("gate_up: scales .* do not fit", lambda: experts(x[:, :6], int4(0), w2[:, :, :6], chosen, shares)),
        ("gate_up: scales .* do not fit", lambda: experts(x[:, :6], int4(2), w2[:, :, :6], chosen, shares)),
        ("gate_up: .*each 1 or more", lambda: experts(x, w13[:, :0], w2[:, :0], chosen, shares)),
        ("gate_up: .*each 1 or more", lambda: experts(x, w13[:, :, :, :0], w2[..., :0], chosen, shares)),
        ("gate_up: .*each 1 or more", lambda: jax.jit(lambda i: experts(x, w13[:0], w2[:0], *picks, layer=i))(0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("n", "buckets"), [(1, 4), (7, 1), (128, 32), (129, 5), (1000, 32)])
def test_the_order_by_counting_is_that_of_a_stable_sort(n: int, buckets: int) -> None:
    ids = jax.random.randint(jax.random.key(n), (n,), 0, buckets + 1)
    found = jax.jit(by_bucket, static_argnums=1)(ids, buckets)
    expected = np.argsort(np.asarray(ids), stable=True)
    assert np.array_equal(found.order, expected) and np.array_equal(found.place, np.argsort(expected))
    assert np.array_equal(found.counts, np.bincount(ids, minlength=buckets + 1)[:buckets])
