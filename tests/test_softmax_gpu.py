"""Softmax attention through GPU libraries: what is asked of them is the reference's mathematics.

cuDNN is not here. `jax.nn.dot_product_attention` has the same arguments for XLA, so the calls are checked with that.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.softmax_attention import gpu, softmax_attention
from tests.tools import TOLERANCE, rms_error

H, K, D = 6, 2, 32

reference: Any = functools.partial(softmax_attention, implementation="reference")
cudnn: Any = functools.partial(gpu.cudnn, library="xla")  # the same arguments for another library


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
        return jax.grad(lambda *a: jnp.vdot(into, fn(*a)), argnums=(0, 1, 2))(*arrays)

    for got, want in zip(gradients(lambda *a: cudnn(*a, None, None)), gradients(reference), strict=True):
        assert rms_error(got, want) < 1e-5
    with pytest.raises(ValueError, match="offset: cuDNN attention into a cache has no gradient"):
        gradients(lambda *a: cudnn(*a, jnp.zeros(2, jnp.int32), None))
    with pytest.raises(ValueError, match="'pallas' decodes and has no gradient"):
        q, k, v = inputs(1, 256)
        jax.grad(lambda q: jnp.sum(softmax_attention(q, k, v, implementation="pallas_interpreted")))(q)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("offset", [(0, 255), (100, 7)])
def test_one_token(offset: tuple[int, int], dtype: str) -> None:
    arrays, at = inputs(1, 256, dtype), jnp.asarray(offset)
    got = softmax_attention(*arrays, offset=at, implementation="pallas_interpreted")
    assert got.dtype == arrays[2].dtype
    assert rms_error(got, reference(*arrays, offset=at)) < TOLERANCE[dtype]


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
        ("offset: expected 0 or more", lambda: softmax_attention(q, k, v, offset=jnp.asarray([0, -1]))),
        ("segments: expected integers", lambda: softmax_attention(q, k, v, segments=ones.astype(jnp.float32))),
        ("segments: expected integers", lambda: softmax_attention(q, k, v, segments=ones[:, :4])),
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
        ("pallas", (q[:, :1], k, v), {}, "CUDA device"),
        ("pallas_interpreted", (q, k, v), {}, "one token"),
        ("pallas_interpreted", inputs(1, 40), {}, "cache length"),
        ("flash", (q, k, v), {}, "unknown 'flash'"),
    ]:
        call: Any = functools.partial(softmax_attention, implementation=implementation, **options)
        with pytest.raises(ValueError, match=f"implementation: .*{why}"):
            call(*arrays)
