"""`linear`: the one function to call, on any device."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from m1jax.kernels.checks import check_implementation, checked_layer
from m1jax.kernels.gpu import refusal
from m1jax.kernels.linear import gpu, gradient, reference
from m1jax.kernels.varying import alike

Implementation = Literal["reference", "xla", "triton", "triton_interpreted"]

NARROW = 64  # channels, such as a factor's of LoRA, below which copying the matrix is as nothing


def linear(
    x: jax.Array, stack: jax.Array, layer: jax.Array | int, *, implementation: Implementation | None = None
) -> jax.Array:
    """x Wᵀ with W = stack[layer], summed in float32.

    Args:
      x: `[N, I]`, float32 or bfloat16.
      stack: `[L, O, I]` in the dtype of `x`; bfloat16 is up-cast to a float32 `x`.
      layer: which W.
      implementation: "reference", "xla", "triton" (Hopper GPUs, up to 256 rows of bfloat16), or "triton_interpreted"
        (its kernel on the CPU, for tests); None chooses by the device and the shapes.

    Returns:
      float32 `[N, O]`.

    Raises:
      ValueError: a shape, a dtype or (where its value is known) the layer does not fit, or a named implementation
        cannot run; says which and why.
    """
    if x.ndim != 2 or 0 in x.shape or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x: expected float32 or bfloat16 [N, I], each 1 or more, got {x.dtype} {x.shape}")
    if stack.ndim != 3 or x.shape[1] != stack.shape[2] or 0 in stack.shape:
        raise ValueError(f"stack: expected [L, O, {x.shape[1]}], each 1 or more, got {stack.shape}")
    layer = checked_layer(layer, stack.shape[0])
    if x.dtype != stack.dtype and (x.dtype, stack.dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(f"stack: dtype {stack.dtype} differs from that of x, {x.dtype}")
    form = _choose(implementation, x, stack)
    x, stack, layer = alike(x, stack, layer)
    if form == "reference":
        return reference.linear(x, stack, layer)
    return gradient.product(x, stack, layer, form)


def _choose(implementation: str | None, x: jax.Array, stack: jax.Array) -> str:
    unfit = gpu.refusal(x, stack)
    if implementation is None:
        narrow = min(stack.shape[1:]) < NARROW
        return "xla" if narrow or unfit or refusal() else "triton"
    reason = None
    if implementation in ("triton", "triton_interpreted"):
        reason = unfit or (refusal() if implementation == "triton" else None)
    return check_implementation(implementation, get_args(Implementation), reason)
