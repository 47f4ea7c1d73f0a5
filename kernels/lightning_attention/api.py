"""`lightning_attention`: the one function to call, on any device."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from m1jax.kernels.checks import check_implementation, check_integers, checked_layer
from m1jax.kernels.gpu import refusal
from m1jax.kernels.lightning_attention import gpu, gradient, recurrent, reference, xla
from m1jax.kernels.varying import alike

Implementation = Literal[
    "reference", "xla", "recurrent", "triton", "triton_interpreted", "mosaic", "mosaic_interpreted"
]
GPU = ("triton", "triton_interpreted", "mosaic", "mosaic_interpreted")
FORGETS = -1e3  # log λ, from which on downwards λ is 0


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


def _chunk(D: int) -> int:
    """Tokens of a chunk: measured best of 32 to 256 on CPUs for head dimensions 32, 64 and 128."""
    return max(64, min(128, D))


def lightning_attention(
    qkv: jax.Array,
    log_decay: jax.Array,
    *,
    state: jax.Array | None = None,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Decaying linear attention of `silu(qkv)`; no scaling, no positions.

    Args:
      qkv: `[B, T, H, 3, D]`, the projection as it comes: for each head q, then k, then v, before the activation;
        finite, also where it is padding.
      log_decay: float32 `[H]`, log λ ≤ 0, also -inf; a constant, which no gradient reaches.
      state: float32 `[B, H, D, D]`; None is zero. With `layer` the states of all layers, `[P, B, H, D, D]`.
      lengths: int32 `[B]`, from 0 to T, valid tokens of each row (the rest is padding on the right); None is T.
      segments: int32 `[B, T]` of packed rows: the same id ≥ 1 for consecutive tokens that belong together, 0 for
        padding; where an id comes again, another segment begins. The state is zero again where a segment starts; a
        row's first token goes on with `state`.
      layer: int32, which of the states to go on with and to replace; on a GPU in place, if the argument is donated.
      implementation: "reference"; "xla"; "recurrent", token by token, each as None computes it alone, with the gradient
        of None; "triton", on Hopper GPUs, head_dim 32, 64 or 128; "mosaic", with faster
        sweeps: bfloat16, head_dim 64 or 128, a multiple of 8 tokens, no segments, log λ ≥ -1.25 (M1's are -1 or more),
        jax ≥ 0.11; "triton_interpreted", "mosaic_interpreted", these on the CPU, for tests. None is the first of
        "mosaic", "triton" that can run, except for more than one token in float32, else "xla"; rows of fewer than 256
        tokens, less than the states that "triton" updates in place, it does not give to "mosaic". Where log_decay is
        traced nobody knows its values: "mosaic", named or chosen, gives NaN below -1.25; name "triton" for those.

    Returns:
      o `[B, T, H, D]` in the dtype of `qkv` (undefined, but finite, at padded tokens), and the float32 state
      after each row's last valid token, with `layer` inside the states of all layers.

    Raises:
      ValueError: a shape, a dtype or (where its value is known) a length, layer or log_decay does not fit, or a named
        implementation cannot run; says which and why.
    """
    _check(qkv, log_decay, state, lengths, segments, layer)
    B, T, H, _, D = qkv.shape
    chosen = _choose(implementation, qkv, segments is not None, log_decay)
    qkv, log_decay, state, lengths, segments, layer = alike(qkv, log_decay, state, lengths, segments, layer)
    # Infinity times no tokens would not be a number.
    log_decay = jax.lax.stop_gradient(jnp.maximum(log_decay, FORGETS))
    state = None if state is None else jnp.asarray(state)
    if lengths is None:
        lengths = jnp.full((B,), T, jnp.int32)
    else:  # a traced one above T would take the padding of the last chunk for tokens
        lengths = jnp.clip(jnp.asarray(lengths, jnp.promote_types(lengths.dtype, jnp.int32)), 0, T).astype(jnp.int32)
    if chosen in GPU:
        kind, _, interpreted = chosen.partition("_")
        form = gpu.default_form(D, qkv.dtype, segments is not None, bool(interpreted), kind == "mosaic")
        states = state if state is None or layer is not None else state[None]
        out, states = gpu.attend(form, qkv, log_decay, states, 0 if layer is None else layer, lengths, segments)
        return out, states if layer is not None else states[0]
    if state is None:
        state = jnp.zeros_like(qkv, jnp.float32, (B, H, D, D))
    before = state if layer is None else state[layer]
    if chosen == "recurrent":
        out, after = recurrent.by_token(_chosen_by_shape, qkv, log_decay, before, lengths, segments)
    elif chosen == "reference":
        out, after = reference.lightning_attention(qkv, log_decay, before, lengths, segments)
    elif T == 1 and segments is None:
        out, after = xla.step(qkv, log_decay, before, lengths)
    else:
        out, after = gradient.chunked(qkv, log_decay, before, lengths, _chunk(D), segments)
    return out, after if layer is None else state.at[layer].set(after)


def _chosen_by_shape(
    qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return lightning_attention(qkv, log_decay, state=state, lengths=lengths, segments=segments)


def _choose(implementation: str | None, qkv: Any, packed: bool, log_decay: Any) -> str:
    T, D, dtype = qkv.shape[1], qkv.shape[4], jnp.dtype(qkv.dtype)
    if implementation is None:
        slow = T > 1 and dtype == jnp.float32  # exact float32 products, which XLA's libraries do better
        if slow or gpu.refusal(D, dtype) or refusal():
            return "xla"
        fits = T >= gpu.MOSAIC_FROM and not gpu.refusal_of_mosaic(qkv, packed, log_decay)
        return "mosaic" if fits else "triton"
    reason = None
    if implementation in GPU:
        reason = gpu.refusal(D, dtype)
        if not implementation.endswith("_interpreted"):
            reason = reason or refusal()
        if implementation.startswith("mosaic"):
            reason = reason or gpu.refusal_of_mosaic(qkv, packed, log_decay)
    return check_implementation(implementation, get_args(Implementation), reason)


def _check(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None,
    lengths: jax.Array | None,
    segments: jax.Array | None,
    layer: jax.Array | int | None,
) -> None:
    if qkv.ndim != 5 or qkv.shape[3] != 3 or 0 in qkv.shape or qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"qkv: expected float32 or bfloat16 [B, T, H, 3, D], each 1 or more, got {qkv.dtype} {qkv.shape}"
        )
    B, T, H, _, D = qkv.shape
    if log_decay.shape != (H,) or log_decay.dtype != jnp.float32:
        raise ValueError(f"log_decay: expected float32 {(H,)}, got {log_decay.dtype} {log_decay.shape}")
    if not isinstance(log_decay, Tracer) and not np.all(np.asarray(log_decay) <= 0):
        raise ValueError(f"log_decay: expected 0 or less, got {np.asarray(log_decay).tolist()}")
    if state is None and layer is not None:
        raise ValueError("layer: says which of the states to use, but state is None")
    if state is not None:
        wanted = (B, H, D, D) if layer is None else (*state.shape[:1], B, H, D, D)
        if state.shape != wanted or state.dtype != jnp.float32:
            raise ValueError(f"state: expected float32 {wanted}, got {state.dtype} {state.shape}")
        if layer is not None:
            if not state.shape[0]:
                raise ValueError(f"state: expected one layer or more, got {state.shape}")
            checked_layer(layer, state.shape[0])
    if lengths is not None:
        check_integers("lengths", lengths, (B,))
        if not isinstance(lengths, Tracer) and np.any((np.asarray(lengths) < 0) | (np.asarray(lengths) > T)):
            raise ValueError(f"lengths: expected 0 to {T}, got {np.asarray(lengths).tolist()}")
    if segments is not None:
        check_integers("segments", segments, (B, T))
