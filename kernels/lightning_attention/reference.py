"""Lightning attention as the recurrence of the MiniMax-01 paper (arXiv 2501.08313, section 2.2), token by token."""

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.segments import valid_and_starts


def lightning_attention(
    qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """S_t = λ S_{t-1} + k_tᵀ v_t, o_t = q_t S_t, with q, k, v = silu(qkv); tokens past a row's length leave S alone.

    Args:
      qkv: `[B, T, H, 3, D]`, before the activation.
      log_decay: float32 `[H]`, log λ.
      state: float32 `[B, H, D, D]` (key channel, value channel).
      lengths: int32 `[B]`.
      segments: int32 `[B, T]` or None: S is zero again where a segment starts; tokens of segment 0 leave S alone.

    Returns:
      o `[B, T, H, D]` in the dtype of `qkv`, and the state after the last valid token of each row.
    """
    activated = jax.nn.silu(qkv.astype(jnp.float32))
    valid, start = valid_and_starts(lengths, qkv.shape[1], segments)

    def token(s: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reads, resets, activated = inputs
        q, k, v = jnp.moveaxis(activated, 2, 0)  # each [B, H, D]
        s = jnp.where(resets[:, None, None, None], 0.0, s)
        # λ S as S + (λ-1) S: in float32 λ itself, near 1, is rounded, and token by token that adds up.
        new = s + jnp.expm1(log_decay)[:, None, None] * s + jnp.einsum("bhd,bhe->bhde", k, v, precision="highest")
        s = jnp.where(reads[:, None, None, None], new, s)
        return s, jnp.einsum("bhd,bhde->bhe", q, s, precision="highest")

    state, out = lax.scan(token, state, (valid.T, start.T, jnp.moveaxis(activated, 1, 0)))
    return jnp.moveaxis(out, 0, 1).astype(qkv.dtype), state
