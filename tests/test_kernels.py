"""One suite per op over every implementation that runs here, against `reference.py`; relative RMS error."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import experts
from m1jax.kernels.gpu.case import reduced
from m1jax.kernels.isolate import by_row
from m1jax.kernels.lightning_attention import lightning_attention, log_decay
from m1jax.kernels.lightning_attention.api import slopes
from m1jax.kernels.linear import cases as linear_cases
from m1jax.kernels.linear import linear, xla
from m1jax.kernels.rounding import mapped
from m1jax.kernels.softmax_attention import softmax_attention
from m1jax.kernels.softmax_attention import xla as softmax_xla
from tests.tools import TOLERANCE, compare_case, normal, rms_error

DTYPES = list(TOLERANCE)


def outputs_and_gradients(fn: Any, *arrays: jax.Array) -> tuple[Any, list[jax.Array]]:
    """What `fn` returns, and gradients of a scalar made of every output, each weighted by its own fixed numbers."""

    @jax.jit
    def run(*arrays: jax.Array) -> tuple[Any, list[jax.Array]]:
        outputs, vjp = jax.vjp(fn, *arrays)
        leaves, tree = jax.tree.flatten(outputs)
        weights = [normal(99 + i, *o.shape).astype(o.dtype) for i, o in enumerate(leaves)]
        return outputs, jax.tree.leaves(vjp(jax.tree.unflatten(tree, weights)))

    return run(*arrays)


def gradients(fn: Any, *arrays: jax.Array) -> list[jax.Array]:
    return outputs_and_gradients(fn, *arrays)[1]


# --- lightning attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "lengths"), [(1, (1, 0)), (5, (5, 2)), (128, (128, 128)), (300, (300, 129))])
def test_lightning_attention(length: int, lengths: tuple[int, int], dtype: str) -> None:
    H, D = 3, 32
    qkv, state = normal(0, 2, length, H, 3, D, dtype=dtype), normal(1, 2, H, D, D)
    decay = jnp.asarray(log_decay(H, 3, 9))

    def run(implementation: Any) -> tuple[jax.Array, jax.Array]:
        named: dict[str, Any] = {"lengths": jnp.asarray(lengths), "implementation": implementation}
        return jax.jit(lambda qkv, state: lightning_attention(qkv, decay, state=state, **named))(qkv, state)

    want, want_state = run("reference")
    for implementation in ("xla", "recurrent", "triton_interpreted"):
        got, got_state = run(implementation)
        assert got.dtype == qkv.dtype and got_state.dtype == jnp.float32
        assert np.all(np.isfinite(got))
        for b, n in enumerate(lengths):
            assert n == 0 or rms_error(got[b, :n], want[b, :n]) < TOLERANCE[dtype], implementation
        exact = implementation != "triton_interpreted"  # in bfloat16 the kernels round silu(k) and silu(v)
        assert rms_error(got_state, want_state) < TOLERANCE["float32" if exact else dtype], implementation


@pytest.mark.parametrize("length", [1, 37, 200])
def test_lightning_attention_gradients(length: int) -> None:
    H, D = 4, 8
    arrays, decay = (normal(0, 2, length, H, 3, D), normal(1, 2, H, D, D)), jnp.asarray(log_decay(H, 1, 4))
    lengths = jnp.asarray([length, max(length - 20, 1)])
    valid = (jnp.arange(length) < lengths[:, None])[..., None, None]

    def run(implementation: Any) -> Any:
        def fn(qkv: jax.Array, state: jax.Array) -> Any:
            out, state = lightning_attention(qkv, decay, state=state, lengths=lengths, implementation=implementation)
            return jnp.where(valid, out, 0), state

        return gradients(fn, *arrays)

    wanted = run("reference")
    for implementation in ("xla", "recurrent"):
        for got, want in zip(run(implementation), wanted, strict=True):
            assert rms_error(got, want) < 1e-5, implementation


def test_token_by_token_is_decoding_bit_by_bit() -> None:
    """Once rounded, and packed, too: a segment's tokens give what they give in a row of their own."""
    B, T, H, D = 4, 24, 3, 32
    qkv, decay = normal(0, B, T, H, 3, D, dtype="bfloat16"), jnp.asarray(log_decay(H, 3, 9))
    recurrent = jax.jit(lambda qkv, **named: lightning_attention(qkv, decay, implementation="recurrent", **named))
    one = jax.jit(lambda qkv, state: lightning_attention(qkv, decay, state=state))
    state, out = jnp.zeros((B, H, D, D)), []
    for t in range(T):
        y, state = one(qkv[:, t : t + 1], state)
        out.append(y)
    want = jnp.concatenate(out, 1)
    got, after = recurrent(qkv)
    assert np.mean(np.asarray(got == want)) > 0.999 and np.mean(np.asarray(after == state)) > 0.5
    chunked = lightning_attention(qkv, decay, implementation="xla")[1]
    assert np.mean(np.asarray(chunked == state)) < 0.5  # else there would be nothing to do
    packed = jnp.concatenate([qkv, qkv[:, :10], qkv[:, :6]], 1)
    segments = jnp.broadcast_to(jnp.asarray([1] * T + [2] * 10 + [0] * 6), (B, T + 16))
    got, after = recurrent(packed, segments=segments)
    for first, last in ((0, T), (T, T + 10)):
        assert np.mean(np.asarray(got[:, first:last] == want[:, : last - first])) > 0.999
    assert rms_error(after, recurrent(qkv, lengths=jnp.full(B, 10))[1]) < 2e-7


def test_decay_of_each_head() -> None:
    """Powers of two: 2^(-8(h+1)/H). Others: worked by hand for 6 heads, c = 4, then every second slope of 8 heads."""
    assert np.allclose(slopes(8), [2.0 ** -(h + 1) for h in range(8)])
    assert np.allclose(slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert log_decay(64, 0, 80)[0] == pytest.approx(-(2 ** (-1 / 8)) * (1 + 1e-5), rel=1e-6)
    assert log_decay(64, 79, 80)[63] == pytest.approx(-(2**-8) * 1e-5, rel=1e-2)


@pytest.mark.parametrize(("T", "in_chunks", "limit"), [(10_000, False, 2e-5), (100_000, True, 2e-6)])
def test_the_state_survives_many_steps(T: int, in_chunks: bool, limit: float) -> None:
    """A bias in λ or its power would grow with the number of steps; the slowest head forgets nothing to speak of."""
    H, D = 2, 4
    qkv = normal(0, 1, T, H, 3, D)
    decay = jnp.asarray([-1e-6, -1e-3], jnp.float32)

    def body(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return lightning_attention(x[None, None], decay, state=state)[1], None

    def steps() -> jax.Array:
        return jax.lax.scan(body, jnp.zeros((1, H, D, D)), qkv[0])[0]

    def chunks() -> jax.Array:
        return lightning_attention(qkv, decay, implementation="xla")[1]

    k, v = np.asarray(jax.nn.silu(qkv[0]), np.float64)[:, :, 1], np.asarray(jax.nn.silu(qkv[0]), np.float64)[:, :, 2]
    age = np.arange(T)[::-1, None]
    want = np.einsum("th,thd,the->hde", np.exp(np.asarray(decay, np.float64) * age), k, v)
    assert rms_error(jax.jit(chunks if in_chunks else steps)()[0], want) < limit


# --- softmax attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "offset"), [(1, 40, (0, 39)), (7, 40, (0, 33)), (300, 700, (0, 400)), (600, 600, (0, 0))]
)
def test_softmax_attention(T: int, N: int, offset: tuple[int, int], dtype: str) -> None:
    H, K, D = 6, 2, 16
    q, k, v = normal(0, 2, T, H, D, dtype=dtype), *(normal(i, 2, K, N, D, dtype=dtype) for i in (1, 2))
    at = jnp.asarray(offset)
    forms: dict[str, Any] = {
        "api": functools.partial(softmax_attention, offset=at, implementation="xla"),
        "direct in blocks": lambda q, k, v: softmax_xla.direct_in_blocks(q, k, v, at, 64),
        "direct": functools.partial(softmax_xla.direct, offset=at),
        "blocked": functools.partial(softmax_xla.blocked, offset=at, q_block=64, k_block=96),
    }
    want = jax.jit(functools.partial(softmax_attention, offset=at, implementation="reference"))(q, k, v)
    for name, form in forms.items():
        out = jax.jit(form)(q, k, v)
        assert out.dtype == v.dtype
        assert rms_error(out, want) < TOLERANCE[dtype], name


def test_softmax_attention_ignores_what_lies_ahead() -> None:
    q, k, v = normal(0, 1, 3, 2, 8), normal(1, 1, 1, 20, 8), normal(2, 1, 1, 20, 8)
    ahead = jnp.arange(20)[:, None] > 7
    far_k, far_v = jnp.where(ahead, 1e30, k), jnp.where(ahead, 1e30, v)
    offset = jnp.asarray([5])
    blocked = functools.partial(softmax_xla.blocked, q_block=2, k_block=4)
    for form in (softmax_xla.direct, blocked):
        run = jax.jit(form)
        assert np.array_equal(run(q, far_k, far_v, offset), run(q, k, v, offset))


def test_softmax_attention_gradients() -> None:
    arrays = normal(0, 1, 50, 4, 8), normal(1, 1, 2, 50, 8), normal(2, 1, 2, 50, 8)
    want = gradients(lambda q, k, v: softmax_attention(q, k, v, implementation="reference"), *arrays)
    got = gradients(lambda q, k, v: softmax_xla.blocked(q, k, v, jnp.zeros(1, jnp.int32), 16, 24), *arrays)
    for a, b in zip(got, want, strict=True):
        assert rms_error(a, b) < 1e-5


# --- experts: see test_experts.py


def routing(seed: int, N: int, k: int, E: int, skew: bool) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((N, E)) + (4 * (np.arange(E) == 1) if skew else 0)
    weights = rng.random((N, k), dtype=np.float32)
    return jnp.asarray(np.argsort(-scores)[:, :k], jnp.int32), jnp.asarray(weights)


# --- linear


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    ("N", "width", "O"), [(1, 256, 6), (2, 512, 8), (4, 256, 7), (8, 256, 6), (1, 24, 5), (33, 48, 20)]
)
def test_linear(N: int, width: int, O: int, dtypes: tuple[str, str]) -> None:
    x, stack = normal(0, N, width, dtype=dtypes[0]), normal(1, 3, O, width, dtype=dtypes[1])
    want = jax.jit(lambda x, stack: linear(x, stack, 2, implementation="reference"))(x, stack)

    def loop(x: jax.Array, stack: jax.Array) -> jax.Array:  # inside a loop, as in the model
        return jax.lax.map(lambda i: linear(x, stack, i, implementation="xla"), jnp.arange(3))[2]

    assert rms_error(jax.jit(loop)(x, stack), want) < TOLERANCE["float32"]
    alone = jax.jit(lambda x, stack: linear(x, stack, 2, implementation="xla"))
    assert rms_error(alone(x, stack), want) < TOLERANCE["float32"]


@pytest.mark.parametrize("case", reduced(linear_cases.CASES), ids=lambda case: case.name)
def test_linear_cases(case: linear_cases.LinearCase) -> None:
    """The shapes that are timed, fewer rows and channels of them."""
    compare_case(case, ("xla", "triton_interpreted"), TOLERANCE["float32"])


@pytest.mark.parametrize("rows", [3, 9])
def test_exact_float32_by_bfloat16_without_a_float32_matrix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices other than CPUs do for the LM head, for few rows and for many."""
    monkeypatch.setattr(xla, "AT_ONCE", 8)
    x, stack = normal(0, rows, 256), normal(1, 2, 20, 256, dtype="bfloat16")
    want = linear(x, stack, 1, implementation="reference")
    run = jax.jit(lambda x, stack: xla.elsewhere(x, stack, (1,)))
    assert rms_error(run(x, stack), want) < TOLERANCE["float32"]
    assert "f32[20,256]" not in str(jax.make_jaxpr(run)(x, stack))


def test_linear_gradients() -> None:
    x, stack = normal(0, 2, 256), normal(1, 2, 6, 256)
    want = gradients(lambda x, w: linear(x, w, 1, implementation="reference"), x, stack)
    for a, b in zip(gradients(lambda x, w: linear(x, w, 1, implementation="xla"), x, stack), want, strict=True):
        assert rms_error(a, b) < 1e-5


# --- bad arguments


def test_a_negative_length_under_jit_spoils_no_other_row() -> None:
    qkv, decay, state = normal(0, 2, 1, 2, 3, 8), jnp.full(2, -0.1), normal(1, 2, 2, 8, 8)
    lengths = jnp.asarray([-1, 1])
    step = jax.jit(lambda n: lightning_attention(qkv, decay, state=state, lengths=n, implementation="xla"))
    want, after = lightning_attention(qkv[1:], decay, state=state[1:], implementation="reference")
    got, new = step(lengths)
    assert rms_error(got[1:], want) < 2e-6 and rms_error(new[1:], after) < 2e-6
    assert np.array_equal(new[0], state[0])


@pytest.mark.parametrize("implementation", ["xla", "recurrent", "triton_interpreted"])
def test_a_length_above_the_row_under_jit_is_that_of_the_row(implementation: Any) -> None:
    """T is no multiple of a chunk, whose padding is no token."""
    qkv, decay = normal(0, 1, 150, 2, 3, 32), jnp.asarray([-0.1, -0.01])
    run = jax.jit(lambda n: lightning_attention(qkv, decay, lengths=n, implementation=implementation))
    for lengths in (jnp.asarray([200]), jnp.asarray([200], jnp.uint8)):
        for got, want in zip(run(lengths), run(jnp.asarray([150])), strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("T", [1, 70])
def test_a_decay_that_forgets_all(T: int) -> None:
    qkv, state, decay = normal(0, 2, T, 2, 3, 32), normal(1, 2, 2, 32, 32), jnp.asarray([-jnp.inf, -0.1])
    named: dict[str, Any] = {"state": state, "lengths": jnp.asarray([T, 0])}
    want, want_after = lightning_attention(qkv, decay, implementation="reference", **named)
    assert rms_error(want_after[1], state[1]) == 0
    for implementation in ("xla", "recurrent", "triton_interpreted"):
        got, after = lightning_attention(qkv, decay, implementation=implementation, **named)
        assert rms_error(got[0], want[0]) < 2e-6 and rms_error(after, want_after) < 2e-6


VARYING: dict[str, tuple[Any, int, Any]] = {  # op, how many of its arguments are split, arguments
    "linear": (lambda x, w: linear(x, w, 1), 1, lambda: (normal(0, 2, 48), normal(1, 3, 5, 48))),
    "linear, in pieces": (lambda x, w: linear(x, w, 1), 1, lambda: (normal(0, 34, 1024), normal(1, 2, 1024, 1024))),
    "experts": (
        lambda x, c, p, w13, w2: experts(x, w13, w2, c, p),
        3,
        lambda: (normal(0, 6, 8), *routing(0, 6, 2, 3, False), normal(1, 1, 3, 2, 4, 8), normal(2, 1, 3, 8, 4)),
    ),
    "lightning, a token": (lambda x: lightning_attention(x, jnp.zeros(2))[0], 1, lambda: (normal(0, 2, 1, 2, 3, 8),)),
    "lightning": (lambda x: lightning_attention(x, jnp.zeros(2))[0], 1, lambda: (normal(0, 2, 70, 2, 3, 8),)),
    "lightning, token by token": (
        lambda x: lightning_attention(x, jnp.zeros(2), implementation="recurrent")[0],
        1,
        lambda: (normal(0, 2, 5, 2, 3, 8),),
    ),
    "mapped": (
        lambda x, w: mapped(lambda w, part: part @ w, w + 0 * jnp.sum(x), x.reshape(-1, 2, 5)).reshape(-1, 4),
        1,
        lambda: (normal(0, 12, 5), normal(1, 5, 4)),
    ),
    "by row": (lambda x: by_row(jax.nn.softmax, x, rows=2), 1, lambda: (normal(0, 6, 5),)),
    "softmax": (
        lambda q, k: softmax_xla.blocked(q, k, k, jnp.zeros_like(q, jnp.int32, q.shape[:1]), 16, 24),
        2,
        lambda: (normal(0, 2, 40, 2, 8), normal(1, 2, 2, 40, 8)),
    ),
}


@pytest.mark.parametrize("name", VARYING)
def test_inside_shard_map_that_tracks_what_varies(name: str) -> None:
    """Values and gradients, also where the weights are the same on all devices."""
    fn, split, make = VARYING[name]
    args = make()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    specs = tuple(rows if i < split else whole for i in range(len(args)))
    at = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of(fn: Any) -> Any:
        def floats(*values: jax.Array) -> Any:
            given = dict(zip(at, values, strict=True))
            return fn(*(given.get(i, x) for i, x in enumerate(args)))

        return outputs_and_gradients(floats, *(args[i] for i in at))

    there = of(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=rows))
    for got, want in zip(jax.tree.leaves(there), jax.tree.leaves(of(fn)), strict=True):
        assert rms_error(got, want) < 1e-6


def test_bad_arguments_are_named() -> None:
    qkv, decay, picks = normal(0, 1, 4, 2, 3, 8), jnp.zeros(2), routing(0, 2, 1, 2, False)
    weights = jnp.zeros((1, 2, 2, 5, 4)), jnp.zeros((1, 2, 4, 5))
    bad: list[tuple[str, Any]] = [
        ("qkv", lambda: lightning_attention(qkv[:, :, :, :2], decay)),
        ("log_decay", lambda: lightning_attention(qkv, decay[:1])),
        ("state", lambda: lightning_attention(qkv, decay, state=jnp.zeros((1, 2, 8, 4)))),
        ("lengths", lambda: lightning_attention(qkv, decay, lengths=jnp.ones(3, jnp.int32))),
        ("lengths", lambda: lightning_attention(qkv, decay, lengths=jnp.asarray([5]))),
        ("lengths", lambda: lightning_attention(qkv[:, :1], decay, lengths=jnp.asarray([-1]), implementation="xla")),
        ("implementation", lambda: lightning_attention(qkv, decay, implementation="none")),  # pyright: ignore
        ("implementation", lambda: linear(decay[None], decay[None, None], 0, implementation="none")),  # pyright: ignore
        ("^stack: dtype", lambda: linear(jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros((1, 3, 2)), 0)),
        ("^x: .*int32", lambda: linear(decay[None].astype(int), decay[None, None].astype(int), 0)),
        ("^x: .*each 1 or more", lambda: linear(decay[None, :0], decay[None, None, :0], 0)),
        ("^x: ", lambda: linear(decay, decay[None, None], 0)),
        ("^stack: .*each 1 or more", lambda: jax.jit(lambda i: linear(decay[None], decay[None, None][:0], i))(0)),
        ("^log_decay: .*0 or less", lambda: lightning_attention(qkv, decay.at[1].set(0.1))),
        ("^log_decay: .*0 or less", lambda: lightning_attention(qkv, decay.at[1].set(jnp.nan))),
        ("^stack: ", lambda: linear(decay[None], decay[None], 0)),
        ("^layer: ", lambda: linear(decay[None], decay[None, None], 1)),
        ("^x: ", lambda: experts(jnp.zeros((2, 3)), *weights, *picks)),
        ("^x: .*each 1 or more", lambda: experts(jnp.zeros((0, 4)), *weights, picks[0][:0], picks[1][:0])),
        ("^weights: .*k ≥ 1", lambda: experts(jnp.zeros((2, 4)), *weights, picks[0][:, :0], picks[1][:, :0])),
        ("^qkv: .*each 1 or more", lambda: lightning_attention(qkv[:0], decay)),
        ("^k: ", lambda: softmax_attention(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 5, 4)), jnp.zeros((1, 2, 5, 4)))),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("kind", [jnp.uint8, jnp.int16, jnp.uint32])
def test_a_layer_of_any_integer_type(kind: Any) -> None:
    x, stack = normal(0, 3, 8), normal(1, 3, 4, 8)
    gate_up, down, (chosen, weights) = normal(2, 3, 2, 2, 6, 8), normal(3, 3, 2, 8, 6), routing(0, 3, 1, 2, False)
    ops = (
        lambda layer: linear(x, stack, layer),
        lambda layer: experts(x, gate_up, down, chosen, weights, layer=layer),
        lambda layer: lightning_attention(x.reshape(1, 1, 1, 3, 8), jnp.zeros(1), state=stack2, layer=layer)[1],
    )
    stack2 = normal(4, 3, 1, 1, 8, 8)
    for op in ops:
        assert rms_error(jax.jit(op)(kind(2)), op(2)) < 1e-6
