"""`linear`: the one function to call, on any device."""

from typing import Literal

import jax
import jax.numpy as jnp

from m1jax.kernels.checks import check_layer
from m1jax.kernels.linear import gradient, reference

Implementation = Literal["reference", "xla"]


def linear(
    x: jax.Array, stack: jax.Array, layer: jax.Array | int, *, implementation: Implementation | None = None
) -> jax.Array:
    """x Wᵀ with W = stack[layer], summed in float32.

    Args:
      x: `[N, I]`, float32 or bfloat16.
      stack: `[L, O, I]` in the dtype of `x`; bfloat16 is up-cast to a float32 `x`.
      layer: which W.
      implementation: "reference" or "xla"; None chooses.

    Returns:
      float32 `[N, O]`.

    Raises:
      ValueError: a shape, a dtype or (where its value is known) the layer does not fit; named.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, I], got {x.shape}")
    if stack.ndim != 3 or x.shape[1] != stack.shape[2]:
        raise ValueError(f"stack: expected [L, O, {x.shape[1]}], got {stack.shape}")
    check_layer(layer, stack.shape[0])
    if x.dtype != stack.dtype and (x.dtype, stack.dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(f"stack: dtype {stack.dtype} differs from that of x, {x.dtype}")
    if implementation == "reference":
        return reference.linear(x, stack, layer)
    if implementation in (None, "xla"):
        return gradient.product(x, stack, layer)
    raise ValueError(f"implementation: unknown {implementation!r}: expected None, 'reference' or 'xla'")
