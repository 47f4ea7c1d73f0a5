"""`linear`: the one function to call, on any device."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.linear import reference

Implementation = Literal["reference", "xla"]


def linear(
    x: jax.Array, stack: jax.Array, layer: jax.Array | int, *, implementation: Implementation | None = None
) -> jax.Array:
    """x Wᵀ with W = stack[layer], summed in float32.

    Args:
      x: `[N, I]`, float32 or bfloat16.
      stack: `[L, O, I]` in the dtype of `x`.
      layer: which W.
      implementation: "reference" or "xla"; None chooses.

    Returns:
      float32 `[N, O]`.

    Raises:
      ValueError: a shape or dtype does not fit; named.
    """
    if x.ndim != 2 or stack.ndim != 3 or x.shape[1] != stack.shape[2]:
        raise ValueError(f"expected x [N, I] and stack [L, O, I], got {x.shape} and {stack.shape}")
    if x.dtype != stack.dtype:
        raise ValueError(f"stack: dtype {stack.dtype} differs from that of x, {x.dtype}")
    if implementation == "reference":
        return reference.linear(x, stack, layer)
    if implementation in (None, "xla"):
        return dot(x, lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False))
    raise ValueError(f"implementation: unknown {implementation!r}: expected None, 'reference' or 'xla'")


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[N, I]` times w `[O, I]` transposed, float32 `[N, O]`: bfloat16 inputs are multiplied as they are."""
    n = x.shape[0]
    if n == 1 and x.dtype == jnp.bfloat16:
        # XLA:CPU has a fast bfloat16 matrix product, but for a single row converts the whole matrix first.
        x = jnp.pad(x, ((0, 1), (0, 0)))
    out = jnp.einsum("ni,oi->no", x, w, precision="highest", preferred_element_type=jnp.float32)
    return out[:n]
