"""`softmax_attention`: the one function to call, on any device; `over_part` where devices have a part of the keys."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from m1jax.kernels.checks import check_implementation, check_integers, checked_layer
from m1jax.kernels.gpu import capability
from m1jax.kernels.segments import numbered
from m1jax.kernels.softmax_attention import gpu, reference, xla
from m1jax.kernels.softmax_attention.pages import in_order, one_each
from m1jax.kernels.varying import alike

Implementation = Literal["reference", "xla", "direct", "cudnn", "triton", "triton_interpreted"]

Q_BLOCK, K_BLOCK = 256, 256  # tokens; a block of scores stays in a core's cache
DIRECT = 1 << 20  # scores per row and key head up to which they are made at once
LONGEST_PAGE = 1024  # tokens, of pages that "xla" reads one by one


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    offset: jax.Array | None = None,
    segments: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    pages: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal attention softmax(q kᵀ/√D) v, softmax in float32; head h reads key head h // (H/K).

    Args:
      q: `[B, T, H, D]`, rotated; float32, bfloat16 or float16, as k and v are.
      k, v: `[B, K, N, D]`, the cache with the new tokens in it. What lies past a query's position, if finite, is
        as nothing. With `layer` the caches of all layers, `[S, B, K, N, D]`. With `pages` it is R pages of P positions
        each that they hold, `[R, K, P, D]` or `[S, R, K, P, D]`.
      offset: integers `[B]` from 0 to N - 1, position of each row's first query; None is 0. Queries past the end of
        the cache, which a padded chunk has, are padding.
      segments: integers `[B, N]` of packed rows, by position: the same id ≥ 1 for consecutive tokens that belong
        together, 0 for padding; where an id comes again, another segment begins. A query sees only the segment at its
        own position.
      layer: which of the caches; "triton" reads it where it lies, for others it is copied.
      pages: integers `[B, n]`: what belongs to position p of row b lies in page pages[b, p // P], at p % P; N is n·P.
        Rows may share a page. Where no query sees a page its number may be any. Pages are read where they lie by
        "triton" (P a multiple of 128, or n = 1) and "xla" (P up to 1024), for others copied into the order of a row.
      implementation: "reference", "xla", "direct" (all keys of a query at once, as "xla" has them where there are few),
        "cudnn" (many queries), "triton" (up to 64 queries of each key head, on Hopper GPUs) or "triton_interpreted"
        (that on the CPU, for tests); None chooses by device and shape.

    Returns:
      `[B, T, H, D]` in the dtype of `v`.

    Raises:
      ValueError: a shape, a dtype or (outside `jax.jit`) an offset does not fit, or a named implementation cannot run;
        says which and why. Also where a gradient is taken through "cudnn" with an `offset`, or "triton", by name.
    """
    layer = _check(q, k, v, offset, segments, layer, pages)
    if offset is not None:
        offset = offset.astype(jnp.int32)  # narrower ones have no room for the sums made of them
    form = _choose(implementation, q, k, offset, segments, pages)
    segments = None if segments is None else numbered(segments)
    q, k, v, offset, segments, layer, pages = alike(q, k, v, offset, segments, layer, pages)
    if layer is None and (pages is not None or form in ("triton", "triton_interpreted")):
        k, v, layer = k[None], v[None], 0
    at = jnp.zeros(q.shape[:1], jnp.int32) if offset is None else offset  # cuDNN is told where there is none
    if form in ("triton", "triton_interpreted"):
        pages = one_each(k) if pages is None else pages
        # What nobody named has a gradient whatever was chosen.
        instead = _of_layer if implementation is None else None
        return gpu.few_queries(q, k, v, at, layer, pages, form == "triton_interpreted", instead)
    if form == "xla" and pages is not None and layer is not None and k.shape[3] <= LONGEST_PAGE:
        few = q.shape[1] <= max(1, _at_once(q, k) // pages.shape[1])
        return xla.in_pages(q, k, v, at, layer, pages, Q_BLOCK, K_BLOCK, few)
    if layer is not None:
        k, v = (in_order(x, pages, layer) for x in (k, v))
    if form == "cudnn":
        return gpu.cudnn(q, k, v, offset, segments, instead=_xla if implementation is None else None)
    if form == "reference":
        return reference.softmax_attention(q, k, v, at, segments)
    if form == "direct":
        return xla.direct_in_blocks(q, k, v, at, _at_once(q, k), segments)
    return _xla(q, k, v, at, segments)


def over_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    layer: jax.Array | int,
    pages: jax.Array | None = None,
    interpreted: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a part of the keys, and how much it weighs beside attention over others.

    q `[B, T, H, D]`; k, v `[S, B, K, N, D]`, or with `pages` as in `softmax_attention`; `offset` int32 `[B]`, the
    position of a row's first query among these keys, may be negative or past their end. `interpreted` is the GPU's
    kernel on the CPU, for tests.

    Returns:
      Output float32 `[B, T, H, D]`, 0 where a query sees no key, and the logarithm of each query's sum of exp(score),
      float32 `[B, T, H]`.
    """
    pages = one_each(k) if pages is None else pages
    q, k, v, offset, layer, pages = alike(q, k, v, offset, layer, pages)
    if interpreted or gpu.refusal_of_triton(q, k, None, pages) is None:
        return gpu.over_part(q, k, v, offset, layer, pages, interpreted, _over_part)
    return _over_part(q, k, v, offset, layer, pages)


def _over_part(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, layer: jax.Array | int, pages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return xla.forward(q, in_order(k, pages, layer), in_order(v, pages, layer), offset, None, Q_BLOCK, K_BLOCK)


def _at_once(q: jax.Array, k: jax.Array) -> int:
    """Queries of a row whose scores are made at once."""
    return DIRECT // (q.shape[2] // k.shape[-3] * k.shape[-2])


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    if q.shape[1] <= _at_once(q, k):
        return xla.direct(q, k, v, offset, segments)
    return xla.blocked(q, k, v, offset, Q_BLOCK, K_BLOCK, segments)


def _of_layer(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, layer: jax.Array, pages: jax.Array
) -> jax.Array:
    return _xla(q, in_order(k, pages, layer), in_order(v, pages, layer), offset)


def _choose(
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    offset: jax.Array | None,
    segments: jax.Array | None,
    pages: jax.Array | None = None,
) -> str:
    if implementation is None:
        if capability() is None:
            return "xla"
        if offset is not None and gpu.refusal_of_triton(q, k, segments, pages) is None:
            return "triton"
        return "xla" if gpu.refusal_of_cudnn(q, k, offset, segments) else "cudnn"
    reason = None
    if implementation == "cudnn":
        reason = gpu.refusal_of_cudnn(q, k, offset, segments)
    elif implementation.startswith("triton"):
        reason = gpu.refusal_of_triton(q, k, segments, pages, implementation == "triton_interpreted")
    return check_implementation(implementation, get_args(Implementation), reason)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array | None,
    segments: jax.Array | None,
    layer: jax.Array | int | None,
    pages: jax.Array | None,
) -> jax.Array | int | None:
    """Raises `ValueError` where something does not fit; returns the layer as `checked_layer` does."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: expected [B, T, H, D], each 1 or more, got {q.shape}")
    B, T, H, D = q.shape
    many, first = (0, "[") if layer is None else (1, "[S, ")
    one = k.shape[many:]
    wanted = f"{first}{B}, K, N, {D}]" if pages is None else f"{first}R, K, P, {D}]"
    fits = k.ndim == 4 + many and 0 not in k.shape and one[3] == D and H % one[1] == 0
    if not fits or (pages is None and one[0] != B):
        raise ValueError(f"k: {k.shape} does not fit q {q.shape}: want {wanted} with K dividing {H}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
    layer = None if layer is None else checked_layer(layer, k.shape[0])
    N = one[2]
    if pages is not None:
        if getattr(pages, "ndim", 0) != 2 or not pages.shape[1]:
            raise ValueError(f"pages: expected integers [{B}, n], n 1 or more, got {getattr(pages, 'shape', pages)}")
        check_integers("pages", pages, (B, pages.shape[1]))
        N *= pages.shape[1]
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {array.dtype} differs from that of q, {q.dtype}")
    if segments is not None:
        if pages is not None:
            raise ValueError("segments: packed rows do not lie in pages: leave pages out")
        check_integers("segments", segments, (B, N))
    if offset is None:
        if T > N:
            raise ValueError(f"q: {T} tokens, but k has keys of {N}")
        return layer
    check_integers("offset", offset, (B,))
    if not isinstance(offset, Tracer) and np.any((np.asarray(offset) < 0) | (np.asarray(offset) >= N)):
        raise ValueError(f"offset: expected 0 to {N - 1}, got {np.asarray(offset).tolist()}")
    return layer
