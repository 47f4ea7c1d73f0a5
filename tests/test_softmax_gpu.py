"""Softmax attention on GPUs: the Triton kernel in its interpreter, and what is asked of cuDNN.

cuDNN is not here. `jax.nn.dot_product_attention` has the same arguments for XLA, so the calls are checked with that.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.gpu.case import reduced
from m1jax.kernels.softmax_attention import api, gpu, softmax_attention
from m1jax.kernels.softmax_attention.cases import CASES, SoftmaxCase
from tests.tools import TOLERANCE, compare_case, normal, rms_error

H, K, D = 6, 2, 32

reference: Any = jax.jit(functools.partial(softmax_attention, implementation="reference"))
over_part: Any = api.over_part
cudnn: Any = jax.jit(functools.partial(gpu.cudnn, library="xla"))  # the same arguments for another library


def inputs(T: int, N: int, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(T)
    shapes = (2, T, H, D), (2, K, N, D), (2, K, N, D)
    return [jnp.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("T", "N", "offset"), [(1, 40, (0, 39)), (7, 40, (0, 33)), (70, 90, (20, 1)), (9, 9, None)])
def test_library_calls(T: int, N: int, offset: Any, dtype: str) -> None:
    arrays = inputs(T, N, dtype)
    at = None if offset is None else jnp.asarray(offset)
    got = cudnn(*arrays, at, None)
    assert got.dtype == arrays[2].dtype
    assert rms_error(got, reference(*arrays, offset=at)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", reduced(CASES), ids=lambda case: case.name)
def test_cases(case: SoftmaxCase) -> None:
    """The shapes that are timed, fewer heads and tokens of them."""
    own = ("triton_interpreted",) if "triton" in case.forms else ()
    compare_case(case, ("xla", *own), TOLERANCE[case.dtype])


def test_padding_past_the_end_of_the_cache() -> None:
    """A chunk of 8 of which 3 are valid, at position 7 of a cache for 10."""
    q, k, v = inputs(8, 10)
    at = jnp.asarray([7, 0])
    got, want = cudnn(q, k, v, at, None), reference(q, k, v, offset=at)
    assert rms_error(got[0, :3], want[0, :3]) < 2e-6 and rms_error(got[1], want[1]) < 2e-6


def test_packed_rows() -> None:
    arrays = inputs(50, 50)
    segments = jnp.asarray([[1] * 20 + [2] * 25 + [0] * 5, [3] * 50])
    got = cudnn(*arrays, None, segments)
    want = reference(*arrays, segments=segments)
    assert rms_error(got[0, :45], want[0, :45]) < 2e-6 and rms_error(got[1], want[1]) < 2e-6


def test_gradients() -> None:
    arrays, into = inputs(30, 30), inputs(31, 30)[0][:, :30]

    def gradients(fn: Any) -> Any:
        return jax.jit(jax.grad(lambda *a: jnp.vdot(into, fn(*a)), argnums=(0, 1, 2)))(*arrays)

    for got, want in zip(gradients(lambda *a: cudnn(*a, None, None)), gradients(reference), strict=True):
        assert rms_error(got, want) < 1e-5
    with pytest.raises(ValueError, match="offset: cuDNN attention into a cache has no gradient"):
        gradients(lambda *a: cudnn(*a, jnp.zeros(2, jnp.int32), None))
    with pytest.raises(ValueError, match="'triton' has no gradient"):
        q, k, v = inputs(1, 256)
        jax.grad(lambda q: jnp.sum(softmax_attention(q, k, v, implementation="triton_interpreted")))(q)


@pytest.mark.parametrize("T", [1, 7])
def test_what_nobody_named_has_a_gradient(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library is chosen that has none, as on a CPU."""
    arrays, at = inputs(T, 256), jnp.asarray([0, 200])
    into = inputs(T, 8)[0]
    monkeypatch.setattr(api, "_choose", lambda named, *_: named or ("triton_interpreted" if T == 1 else "cudnn"))
    monkeypatch.setattr(api.gpu, "cudnn", functools.partial(gpu.cudnn, library="xla"))

    def gradients(how: Any) -> Any:
        def value(*a: jax.Array) -> Any:
            return jnp.vdot(into, softmax_attention(*a, offset=at, implementation=how))

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*arrays)

    (value, got), (want_value, want) = gradients(None), gradients("reference")
    assert value == pytest.approx(float(want_value), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert rms_error(a, b) < 1e-5


def test_cudnn_gives_its_sums_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, not run: the logarithms of both sums go into the shares as float32, which is what cuDNN returns."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 92_200)
    offset = jnp.asarray([0, 30], jnp.uint8)
    text = str(jax.make_jaxpr(functools.partial(gpu.cudnn, segments=None))(*inputs(8, 40, "bfloat16"), offset))
    assert f"f32[2,{H},8]" in text
    assert f"bf16[2,{H},8]" not in text and f"bf16[2,8,{H}]" not in text


def caches(T: int, N: int, dtype: str = "float32") -> list[jax.Array]:
    """As `inputs`, keys and values of three layers."""
    q, *_ = inputs(T, N, dtype)
    return [q, *(normal(seed, 3, 2, K, N, D, dtype=dtype) for seed in (N, N + 1))]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("T", "N", "offset"), [(1, 40, (0, 39)), (1, 2100, (2099, 150)), (5, 600, (0, 595)), (5, 1030, (1000, 1))]
)
def test_few_queries(T: int, N: int, offset: tuple[int, int], dtype: str) -> None:
    """One part of the keys and several, of which some are empty."""
    arrays, at = caches(T, N, dtype), jnp.asarray(offset)
    run: Any = jax.jit(functools.partial(softmax_attention, implementation="triton_interpreted"))
    for layer in (0, 2):
        want = reference(*arrays, offset=at, layer=layer)
        got = run(*arrays, offset=at, layer=layer)
        assert got.dtype == arrays[2].dtype
        assert rms_error(got, want) < TOLERANCE[dtype]
    if N == 40:
        alone = run(*(a if a.ndim == 4 else a[2] for a in arrays), offset=at.astype(jnp.uint8))
        assert np.array_equal(alone, got)


def in_pages(arrays: list[jax.Array], P: int) -> tuple[list[jax.Array], jax.Array]:
    """q and caches cut into pages of P positions, which lie in any order, and where those of each row are."""
    q, *caches = arrays
    S, B, _, N, _ = caches[0].shape
    n = N // P
    pages = np.random.default_rng(P).permutation(B * n)
    out = []
    for x in caches:
        flat = x.reshape(S, B, K, n, P, D).swapaxes(2, 3).reshape(S, B * n, K, P, D)
        out.append(jnp.zeros_like(flat).at[:, pages].set(flat))
    return [q, *out], jnp.asarray(pages.reshape(B, n), jnp.int32)


@pytest.mark.parametrize("implementation", ["reference", "xla", "direct", "triton_interpreted", None])
@pytest.mark.parametrize(("T", "N", "P", "dtype"), [(5, 1024, 128, "float32"), (1, 1280, 256, "bfloat16")])
def test_pages(implementation: Any, T: int, N: int, P: int, dtype: str) -> None:
    """As if keys and values lay in order; of what no query sees the numbers may be any; rows may share pages."""
    arrays, at = caches(T, N, dtype), jnp.asarray([N - T, 2 * P - T])
    cut, pages = in_pages(arrays, P)
    run = functools.partial(softmax_attention, offset=at, layer=1, implementation=implementation)
    want = reference(*arrays, offset=at, layer=1)
    for numbers in (pages, pages.at[1, 2:].set(1 << 20), pages.at[1, 2:].set(-5).astype(jnp.int16)):
        assert rms_error(run(*cut, pages=numbers), want) < TOLERANCE[dtype]
    shared = pages.at[1, 0].set(pages[0, 0])
    both = [arrays[0], *(x.at[:, 1, :, :P].set(x[:, 0, :, :P]) for x in arrays[1:])]
    assert rms_error(run(*cut, pages=shared), reference(*both, offset=at, layer=1)) < TOLERANCE[dtype]
    of_one_layer = [cut[0], *(x[1] for x in cut[1:])]
    alone = softmax_attention(*of_one_layer, offset=at, pages=pages, implementation=implementation)
    assert rms_error(alone, want) < TOLERANCE[dtype]


def test_pages_by_cudnn_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, at = caches(70, 512), jnp.asarray([440, 3])
    cut, pages = in_pages(arrays, 128)
    want = reference(*arrays, offset=at, layer=2)
    monkeypatch.setattr(api.gpu, "cudnn", functools.partial(gpu.cudnn, library="xla"))
    for chosen, tokens in (("cudnn", 70), ("xla", 70), ("triton_interpreted", 4)):
        monkeypatch.setattr(api, "_choose", lambda *_, chosen=chosen: chosen)
        got = softmax_attention(cut[0][:, :tokens], *cut[1:], offset=at, layer=2, pages=pages)
        assert rms_error(got, want[:, :tokens]) < 2e-6

        def value(q: jax.Array, k: jax.Array, v: jax.Array, pages: Any) -> jax.Array:
            return jnp.sum(softmax_attention(q, k, v, offset=at, layer=2, pages=pages) ** 2)

        gradients: Any = jax.grad(value, argnums=(0, 1, 2))
        own = in_pages(list(gradients(arrays[0][:, :tokens], *arrays[1:], None)), 128)[0]
        for a, b in zip(gradients(cut[0][:, :tokens], *cut[1:], pages), own, strict=True):
            assert rms_error(a, b) < 1e-5


def test_what_lies_past_the_tokens_is_not_read() -> None:
    q, k, v = caches(2, 300)
    at = jnp.asarray([7, 160])
    run = functools.partial(softmax_attention, layer=1, offset=at, implementation="triton_interpreted")
    spoiled = [a.at[:, 0, :, 9:].set(jnp.nan).at[:, 1, :, 162:].set(jnp.nan) for a in (k, v)]
    assert np.array_equal(run(q, *spoiled), run(q, k, v))


@pytest.mark.parametrize(("T", "N"), [(1, 40), (4, 1100)])
def test_a_part_of_the_keys(T: int, N: int) -> None:
    """Of another device's keys rows see none, some or all."""
    arrays = caches(T, N)
    for offset in ((-2, N // 2), (N + 3, -T), (-1000, 1 << 30)):
        at = jnp.asarray(offset, jnp.int32)
        got = over_part(*arrays, at, 1, interpreted=True)
        want = over_part(*arrays, at, 1)
        assert np.array_equal(np.isneginf(got[1]), np.isneginf(want[1]))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_part_of_the_keys_has_a_gradient() -> None:
    arrays, at = caches(2, 40), jnp.asarray([3, 30])

    def gradients(interpreted: bool) -> Any:
        def value(*arrays: jax.Array) -> Any:
            out, log_sums = over_part(*arrays, at, 1, interpreted=interpreted)
            return jnp.sum(out**2) + jnp.sum(log_sums)

        return jax.grad(value, argnums=(0, 1, 2))(*arrays)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    q, k, v = inputs(4, 8)
    ones = jnp.ones((2, 8), jnp.int32)
    bad: list[tuple[str, Any]] = [
        ("q: expected float32", lambda: softmax_attention(*(a.astype(jnp.int32) for a in (q, k, v)))),
        ("k: dtype", lambda: softmax_attention(q, k.astype(jnp.bfloat16), v)),
        ("v: dtype", lambda: softmax_attention(q, k, v.astype(jnp.bfloat16))),
        ("offset: expected integers", lambda: softmax_attention(q, k, v, offset=jnp.zeros(2))),
        ("offset: expected integers", lambda: softmax_attention(q, k, v, offset=jnp.zeros(3, jnp.int32))),
        ("offset: expected integers", lambda: softmax_attention(q, k, v, offset=jnp.int32(0))),
        ("offset: expected 0 to 7", lambda: softmax_attention(q, k, v, offset=jnp.asarray([0, -1]))),
        ("offset: expected 0 to 7", lambda: softmax_attention(q, k, v, offset=jnp.asarray([0, 8]))),
        ("offset: expected integers", lambda: softmax_attention(q, k, v, offset=[0, 1])),  # pyright: ignore
        ("q: 9 tokens", lambda: softmax_attention(inputs(9, 8)[0], k, v)),
        (r"q: expected \[B", lambda: softmax_attention(q[0], k, v)),
        ("q: .* each 1 or more", lambda: softmax_attention(q[..., :0], k[..., :0], v[..., :0])),
        ("v: expected the shape of k", lambda: softmax_attention(q, k, v[:, :1])),
        ("segments: expected integers", lambda: softmax_attention(q, k, v, segments=ones.astype(jnp.float32))),
        ("segments: expected integers", lambda: softmax_attention(q, k, v, segments=ones[:, :4])),
    ]
    many = [q, *caches(4, 8)[1:]]
    bad += [
        (r"k: .* want \[S, 2, K, N, 32\]", lambda: softmax_attention(q, k, v, layer=0)),
        ("k: ", lambda: softmax_attention(*many)),
        ("layer: expected 0 to 2, got 3", lambda: softmax_attention(*many, layer=3)),
        (r"pages: expected integers \[2, n\]", lambda: softmax_attention(q, k, v, pages=ones[0])),
        (r"pages: expected integers \[2, n\]", lambda: softmax_attention(q, k, v, pages=ones[:, :0])),
        (r"pages: expected integers \(2, 8\)", lambda: softmax_attention(q, k, v, pages=ones * 1.0)),
        (r"pages: expected integers \(2, 1\)", lambda: softmax_attention(q, k, v, pages=ones[:1, :1])),
        (r"k: .* want \[R, K, P, 32\]", lambda: softmax_attention(q, *many[1:], pages=ones)),
        ("offset: expected 0 to 63", lambda: softmax_attention(q, k, v, offset=ones[:, 0] * 64, pages=ones)),
        ("segments: packed rows do not lie in pages", lambda: softmax_attention(q, k, v, segments=ones, pages=ones)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_what_cannot_run_says_why() -> None:
    q, k, v = inputs(4, 256, "bfloat16")
    narrow = [a[..., :20] for a in (q, k, v)]
    segments = jnp.ones((2, 256), jnp.int32)
    for implementation, arrays, options, why in [
        ("cudnn", (q, k, v), {}, "CUDA device"),
        ("cudnn", inputs(4, 8), {}, "bfloat16"),
        ("cudnn", narrow, {}, "multiple of 8"),
        ("cudnn", (q, k, v), {"segments": segments}, "packed rows"),
        ("cudnn", (q, k, v), {"segments": segments, "offset": segments[:, 0]}, "without an offset"),
        ("triton", (q, k, v), {}, "CUDA device"),
        ("triton_interpreted", inputs(22, 256), {}, "up to 64 queries"),
        ("triton_interpreted", narrow, {}, "power of two"),
        ("triton_interpreted", inputs(1, 40), {"pages": segments[:, :2]}, "pages of a multiple of 64"),
        ("triton_interpreted", (q, k, v), {"segments": segments}, "packed rows"),
        ("flash", (q, k, v), {}, "unknown 'flash'"),
    ]:
        call: Any = functools.partial(softmax_attention, implementation=implementation, **options)
        with pytest.raises(ValueError, match=f"implementation: .*{why}"):
            call(*arrays)


def test_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no library can do is left to XLA, also where a module of jax is gone."""
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    monkeypatch.setattr(gpu, "refusal", lambda: None)
    monkeypatch.setattr(api, "capability", lambda: 90)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at, segments, T = jnp.zeros(2, jnp.int32), jnp.ones((2, 255), jnp.int32), 16_384

    def choice(T: int, N: int, **options: Any) -> str:
        q, k, _ = inputs(T, N, "bfloat16")
        return api._choose(None, q, k, options.get("offset"), options.get("segments"))

    assert choice(1, 250, offset=at) == choice(8, 256, offset=at) == "triton"
    assert choice(1, 1) == choice(8, 8) == choice(22, 256, offset=at) == "cudnn"
    assert choice(256, 256, segments=jnp.ones((2, 256), jnp.int32)) == "cudnn"
    assert choice(255, 255, segments=segments) == "xla"
    assert choice(256, 256, segments=jnp.ones((2, 256), jnp.int32), offset=at) == "xla"
    for rows, chosen in ((1, "cudnn"), (3, "xla")):  # of the mask, in memory
        q, k, ids = (jax.ShapeDtypeStruct((rows, *shape), jnp.bfloat16) for shape in ((T, 2, 16), (2, T, 16), (T,)))
        assert api._choose(None, q, k, None, ids) == chosen  # pyright: ignore
    with pytest.raises(ValueError, match="even number"):
        softmax_attention(*inputs(255, 255, "bfloat16"), segments=segments, implementation="cudnn")
    monkeypatch.setattr(gpu, "_FUSED", "jax._src.nowhere")
    assert choice(22, 256, offset=at) == "xla" and choice(8, 8) == "cudnn"
    q = jnp.zeros((1, 8, 2, 256), jnp.bfloat16)
    for device, wide, narrow in ((75, "xla", "xla"), (80, "xla", "cudnn"), (90, "cudnn", "cudnn")):
        monkeypatch.setattr(gpu, "capability", lambda device=device: device)
        assert api._choose(None, q, q.swapaxes(1, 2), None, None) == wide and choice(8, 8) == narrow
