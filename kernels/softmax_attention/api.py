"""`softmax_attention`: the one function to call, on any device."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from m1jax.kernels.checks import check_implementation, check_integers
from m1jax.kernels.gpu import capability
from m1jax.kernels.segments import numbered
from m1jax.kernels.softmax_attention import gpu, reference, xla
from m1jax.kernels.varying import alike

Implementation = Literal["reference", "xla", "direct", "cudnn", "pallas", "pallas_interpreted"]

Q_BLOCK, K_BLOCK = 256, 256  # tokens; a block of scores stays in a core's cache
DIRECT = 1 << 20  # scores per row and key head up to which they are made at once


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    offset: jax.Array | None = None,
    segments: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal attention softmax(q kᵀ/√D) v, softmax in float32; head h reads key head h // (H/K).

    Args:
      q: `[B, T, H, D]`, rotated; float32, bfloat16 or float16, as k and v are.
      k, v: `[B, K, N, D]`, the cache with the new tokens in it. What lies past a query's position, if finite, is
        as nothing.
      offset: integers `[B]` from 0 to N - 1, position of each row's first query; None is 0. Queries past the end of
        the cache, which a padded chunk has, are padding.
      segments: integers `[B, N]` of packed rows, by position: the same id ≥ 1 for consecutive tokens that belong
        together, 0 for padding; where an id comes again, another segment begins. A query sees only the segment at its
        own position.
      implementation: "reference", "xla", "direct" (all keys of a query at once, as "xla" has them where there are few),
        "cudnn" (many queries), "pallas" (one query of each row) or "pallas_interpreted" (that on the CPU, for tests);
        None chooses by device and shape.

    Returns:
      `[B, T, H, D]` in the dtype of `v`.

    Raises:
      ValueError: a shape, a dtype or (outside `jax.jit`) an offset does not fit, or a named implementation cannot run;
        says which and why. Also where a gradient is taken through "cudnn" with an `offset`, or "pallas", by name.
    """
    _check(q, k, v, offset, segments)
    B = q.shape[0]
    if offset is not None:
        offset = offset.astype(jnp.int32)  # narrower ones have no room for the sums made of them
    form = _choose(implementation, q, k, offset, segments)
    segments = None if segments is None else numbered(segments)
    q, k, v, offset, segments = alike(q, k, v, offset, segments)
    # What nobody named has a gradient whatever was chosen.
    instead = _xla if implementation is None else None
    if form == "cudnn":
        return gpu.cudnn(q, k, v, offset, segments, instead=instead)
    if offset is None:
        offset = jnp.zeros((B,), jnp.int32)
    if form in ("pallas", "pallas_interpreted"):
        return gpu.pallas(q, k, v, offset, form == "pallas_interpreted", instead)
    if form == "reference":
        return reference.softmax_attention(q, k, v, offset, segments)
    if form == "direct":
        return xla.direct_in_blocks(q, k, v, offset, _at_once(q, k), segments)
    return _xla(q, k, v, offset, segments)


def _at_once(q: jax.Array, k: jax.Array) -> int:
    """Queries of a row whose scores are made at once."""
    return DIRECT // (q.shape[2] // k.shape[1] * k.shape[2])


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    if q.shape[1] <= _at_once(q, k):
        return xla.direct(q, k, v, offset, segments)
    return xla.blocked(q, k, v, offset, Q_BLOCK, K_BLOCK, segments)


def _choose(
    implementation: str | None, q: jax.Array, k: jax.Array, offset: jax.Array | None, segments: jax.Array | None
) -> str:
    if implementation is None:
        if capability() is None:
            return "xla"
        if gpu.refusal_of_pallas(q, k, segments) is None:
            return "pallas"
        return "xla" if gpu.refusal_of_cudnn(q, k, offset, segments) else "cudnn"
    reason = None
    if implementation == "cudnn":
        reason = gpu.refusal_of_cudnn(q, k, offset, segments)
    elif implementation.startswith("pallas"):
        reason = gpu.refusal_of_pallas(q, k, segments, implementation == "pallas_interpreted")
    return check_implementation(implementation, get_args(Implementation), reason)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array | None, segments: jax.Array | None) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: expected [B, T, H, D], each 1 or more, got {q.shape}")
    B, T, H, D = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[3] != D or not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"k: {k.shape} does not fit q {q.shape}: want [{B}, K, N, {D}] with K dividing {H}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
    N = k.shape[2]
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {array.dtype} differs from that of q, {q.dtype}")
    if segments is not None:
        check_integers("segments", segments, (B, N))
    if offset is None:
        if T > N:
            raise ValueError(f"q: {T} tokens, but k has keys of {N}")
        return
    check_integers("offset", offset, (B,))
    if not isinstance(offset, Tracer) and np.any((np.asarray(offset) < 0) | (np.asarray(offset) >= N)):
        raise ValueError(f"offset: expected 0 to {N - 1}, got {np.asarray(offset).tolist()}")
