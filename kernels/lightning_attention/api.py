"""`lightning_attention`: the one function to call, on any device."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.kernels.lightning_attention import gradient, reference, xla

Implementation = Literal["reference", "xla"]

CHUNK = 128  # tokens; measured best of 64, 128, 256 on CPUs for head_dim 64 and 128


def slopes(heads: int) -> np.ndarray:
    """ALiBi slopes, float32 `[heads]`: 2^(-8(h+1)/heads) where `heads` is a power of two.

    Otherwise the slopes of the power of two c below, then every second one of 2c (Press et al., arXiv 2108.12409).
    """
    c = 2 ** int(np.log2(heads))
    out = [2.0 ** (-8.0 * (h + 1) / c) for h in range(c)]
    if c < heads:
        out += [2.0 ** (-8.0 * (h + 1) / (2 * c)) for h in range(2 * c)][0::2][: heads - c]
    return np.asarray(out, np.float32)


def log_decay(heads: int, layer: int, layers: int) -> np.ndarray:
    """log λ of each head in one layer, float32 `[heads]`: -slope · (1 - layer/(layers-1) + 1e-5)."""
    factor = 1 - layer / max(layers - 1, 1) + 1e-5
    return -slopes(heads) * np.float32(factor)


def lightning_attention(
    qkv: jax.Array,
    log_decay: jax.Array,
    *,
    state: jax.Array | None = None,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Decaying linear attention of `silu(qkv)`; no scaling, no positions.

    Args:
      qkv: `[B, T, H, 3, D]`, the projection as it comes: for each head q, then k, then v, before the activation.
      log_decay: float32 `[H]`, log λ ≤ 0; a constant, which no gradient reaches.
      state: float32 `[B, H, D, D]`; None is zero.
      lengths: int32 `[B]`, valid tokens of each row (the rest is padding on the right); None is T.
      segments: int32 `[B, T]` of packed rows: the same id ≥ 1 for consecutive tokens that belong together, 0 for
        padding. The state is zero again where a segment starts; a row's first token goes on with `state`.
      implementation: "reference" or "xla"; None chooses.

    Returns:
      o `[B, T, H, D]` in the dtype of `qkv` (undefined, but finite, at padded tokens), and the float32 state
      after each row's last valid token.

    Raises:
      ValueError: a shape or dtype does not fit; named.
    """
    if qkv.ndim != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv: expected [B, T, H, 3, D], got {qkv.shape}")
    B, T, H, _, D = qkv.shape
    if log_decay.shape != (H,):
        raise ValueError(f"log_decay: expected {(H,)}, got {log_decay.shape}")
    log_decay = jax.lax.stop_gradient(log_decay)
    if state is None:
        state = jnp.zeros((B, H, D, D), jnp.float32)
    if state.shape != (B, H, D, D) or state.dtype != jnp.float32:
        raise ValueError(f"state: expected float32 {(B, H, D, D)}, got {state.dtype} {state.shape}")
    if lengths is None:
        lengths = jnp.full((B,), T, jnp.int32)
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected {(B,)}, got {lengths.shape}")
    if segments is not None and segments.shape != (B, T):
        raise ValueError(f"segments: expected {(B, T)}, got {segments.shape}")
    if implementation == "reference":
        return reference.lightning_attention(qkv, log_decay, state, lengths, segments)
    if implementation in (None, "xla"):
        if T == 1 and segments is None:
            return xla.step(qkv, log_decay, state, lengths)
        return gradient.chunked(qkv, log_decay, state, lengths, CHUNK, segments)
    raise ValueError(f"implementation: unknown {implementation!r}: expected None, 'reference' or 'xla'")
