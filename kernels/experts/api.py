"""`experts`: the one function to call, on any device."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.checks import check_implementation, check_integers, checked_layer
from m1jax.kernels.experts import gpu, gradient, reference
from m1jax.kernels.experts.quantized import Quantized, Weights
from m1jax.kernels.gpu import refusal
from m1jax.kernels.varying import alike

Implementation = Literal["reference", "xla", "triton", "triton_interpreted", "mosaic", "mosaic_interpreted"]


def experts(
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    chosen: jax.Array,
    weights: jax.Array,
    *,
    layer: jax.Array | int = 0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """SwiGLU experts, dropless: y_n = Σ_j weights[n, j] · w2_e(silu(w1_e x_n) ⊙ w3_e x_n), e = chosen[n, j].

    Args:
      x: `[N, M]`, float32 or bfloat16.
      gate_up: `[L, E, 2, F, M]` in the dtype of x, or `Quantized`: w1 and w3 of every expert of every layer.
      down: `[L, E, M, F]`, w2, likewise. Quantised weights are constants: they have no gradient.
      chosen: integers `[N, k]`, the experts of each token; E means none (padding), as does any number that is no
        expert's, and costs nothing.
      weights: float32 `[N, k]`; the share of none counts nothing, whatever it is.
      layer: which layer of the stacks.
      implementation: "reference", "xla", "triton" (Hopper GPUs), "mosaic" (the same, for many rows in bfloat16, F and
        M multiples of 64, with jax ≥ 0.11; its gradients are "triton"'s), or "triton_interpreted" and
        "mosaic_interpreted" (their kernels on the CPU, for tests); None is "triton" where that can run, else "xla".

    Returns:
      float32 `[N, M]`.

    Raises:
      ValueError: a shape, a dtype or (where its value is known) the layer does not fit, or a named
        implementation cannot run; says which and why.
    """
    x = jnp.asarray(x)  # of NumPy: it is indexed with what is traced
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x: expected float32 or bfloat16, got {x.dtype}")
    gate_up, down = _checked("gate_up", gate_up, x.dtype), _checked("down", down, x.dtype)
    if len(gate_up.shape) != 5 or gate_up.shape[2] != 2 or 0 in gate_up.shape:
        raise ValueError(f"gate_up: expected [L, E, 2, F, M], each 1 or more, got {gate_up.shape}")
    L, E, _, F, M = gate_up.shape
    if x.ndim != 2 or x.shape[1] != M or 0 in x.shape:
        raise ValueError(f"x: expected [N, {M}], each 1 or more, got {x.shape}")
    if down.shape != (L, E, M, F):
        raise ValueError(f"down: expected {(L, E, M, F)}, got {down.shape}")
    layer = checked_layer(layer, L)
    if weights.ndim != 2 or weights.shape[0] != x.shape[0] or not weights.shape[1] or weights.dtype != jnp.float32:
        raise ValueError(f"weights: expected float32 [{x.shape[0]}, k ≥ 1], got {weights.dtype} {weights.shape}")
    check_integers("chosen", chosen, weights.shape)
    # A number that is no expert's would be written to the place of another token.
    chosen = chosen.astype(jnp.promote_types(chosen.dtype, jnp.int32))
    chosen = jnp.where((chosen >= 0) & (chosen < E), chosen, E).astype(jnp.int32)
    weights = jnp.where(chosen < E, weights, 0.0)  # 0 times NaN would spoil the token
    form = _choose(implementation, gate_up, down)
    x, gate_up, down, layer, chosen, weights = alike(x, gate_up, down, layer, chosen, weights)
    if form == "reference":
        return reference.experts(x, gate_up, down, layer, chosen, weights)
    if form != "xla":
        kind, _, interpreted = form.partition("_")
        how = {"interpreted": bool(interpreted), "mosaic": kind == "mosaic"}
        return gpu.experts(x, gate_up, down, layer, chosen, weights, **how)
    rows = _rows(chosen.shape[0], chosen.shape[1], E)
    return gradient.blocked(x, gate_up, down, layer, chosen, weights, rows)


def _choose(implementation: str | None, gate_up: Weights, down: Weights) -> str:
    unfit = gpu.refusal(gate_up, down)
    if implementation is None:
        return "xla" if unfit or refusal() else "triton"
    reason = None
    if implementation.startswith(("triton", "mosaic")):
        mosaic = gpu.refusal_of_mosaic(gate_up, down) if implementation.startswith("mosaic") else None
        reason = unfit or mosaic or (None if implementation.endswith("_interpreted") else refusal())
    return check_implementation(implementation, get_args(Implementation), reason)


def _checked(name: str, weights: Weights, dtype: jnp.dtype) -> Weights:
    """The weights, constant if they are quantised; raises `ValueError` if their dtypes do not fit."""
    if not isinstance(weights, Quantized):
        if weights.dtype != dtype:
            raise ValueError(f"{name}: dtype {weights.dtype} differs from that of x, {dtype}")
        return weights
    values, scales = weights.values, weights.scales
    if values.dtype not in (jnp.int8, jnp.uint8) or scales.dtype != jnp.float32:
        raise ValueError(f"{name}: expected int8 or uint8 values, float32 scales, got {values.dtype}, {scales.dtype}")
    if weights.kind == "int8":
        fits = scales.shape == values.shape[:-1]
    else:  # a group is of two halves
        groups = scales.shape[-1] if scales.ndim else 0
        fits = scales.shape[:-1] == values.shape[:-1] and groups > 0 and values.shape[-1] % groups == 0
    if not fits:
        raise ValueError(f"{name}: scales {scales.shape} do not fit the values {values.shape} of {weights.kind}")
    return lax.stop_gradient(weights)


def _rows(N: int, k: int, E: int) -> int:
    """Rows of a block: an expert's share of the tokens and a quarter, so that most experts need one block.

    Every block reads, and packs for the product, an expert's weights; rows computed in vain are cheaper.
    """
    share = min(max(1.25 * N * k / E, 8), 1536)
    step = 64 if share > 64 else 8
    return min(math.ceil(share / step) * step, N)
