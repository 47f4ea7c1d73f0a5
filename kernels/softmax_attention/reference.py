"""Softmax attention written out, scores whole."""

import jax
import jax.numpy as jnp


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ/√D) v with query t of row b at position offset[b] + t, seeing keys up to its own position.

    Shapes: q `[B, T, H, D]`; k, v `[B, K, N, D]`; offset int32 `[B]`; segments int32 `[B, N]` or None, where a query
    sees only the keys of the segment at its own position; returns `[B, T, H, D]`.
    """
    B, T, H, D = q.shape
    K, N = k.shape[1:3]
    q = q.astype(jnp.float32).reshape(B, T, K, H // K, D)
    scores = jnp.einsum("btkgd,bknd->bkgtn", q, k.astype(jnp.float32), precision="highest") * D**-0.5
    position = offset[:, None] + jnp.arange(T)
    visible = jnp.arange(N) <= position[..., None]  # [B, T, N]
    if segments is not None:
        own = jnp.take_along_axis(segments, position, axis=1)
        visible &= segments[:, None] == own[..., None]
    p = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgtn,bknd->btkgd", p, v.astype(jnp.float32), precision="highest")
    return out.reshape(B, T, H, D).astype(v.dtype)
