"""`softmax_attention`: the one function to call, on any device."""

from typing import Literal

import jax
import jax.numpy as jnp

from m1jax.kernels.softmax_attention import reference, xla

Implementation = Literal["reference", "xla"]

Q_BLOCK, K_BLOCK = 256, 512  # tokens; a block of scores stays in a core's cache
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
      q: `[B, T, H, D]`, rotated.
      k, v: `[B, K, N, D]`, the cache with the new tokens in it. What lies past a query's position is not read.
      offset: int32 `[B]`, position of each row's first query; None is 0.
      segments: int32 `[B, N]` of packed rows, by position: the same id ≥ 1 for consecutive tokens that belong
        together, 0 for padding. A query sees only the segment at its own position.
      implementation: "reference" or "xla"; None chooses.

    Returns:
      `[B, T, H, D]` in the dtype of `v`.

    Raises:
      ValueError: a shape does not fit; named.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"expected q [B, T, H, D] and k, v [B, K, N, D], got {q.shape}, {k.shape}, {v.shape}")
    B, T, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(f"k: {k.shape} does not fit q {q.shape}: want [{B}, K, N, {D}] with K dividing {H}")
    if offset is None:
        offset = jnp.zeros((B,), jnp.int32)
    if segments is not None and segments.shape != (B, k.shape[2]):
        raise ValueError(f"segments: expected {(B, k.shape[2])}, got {segments.shape}")
    if implementation == "reference":
        return reference.softmax_attention(q, k, v, offset, segments)
    if implementation in (None, "xla"):
        if T * (H // k.shape[1]) * k.shape[2] <= DIRECT:
            return xla.direct(q, k, v, offset, segments)
        return xla.blocked(q, k, v, offset, Q_BLOCK, K_BLOCK, segments)
    raise ValueError(f"implementation: unknown {implementation!r}: expected None, 'reference' or 'xla'")
