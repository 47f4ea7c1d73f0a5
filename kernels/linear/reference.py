"""y = x Wᵀ with W one layer of a stack."""

import jax
import jax.numpy as jnp


def linear(x: jax.Array, stack: jax.Array, layer: jax.Array | int) -> jax.Array:
    """x `[N, I]`, stack `[L, O, I]`; float32 `[N, O]`."""
    w = stack[layer].astype(jnp.float32)
    return jnp.einsum("ni,oi->no", x.astype(jnp.float32), w, precision="highest")
