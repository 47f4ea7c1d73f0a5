"""The gradient of a product with one matrix of a stack: two plain products, whatever form the product itself took."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.linear import gpu, xla

Residuals = tuple[jax.Array, jax.Array, jax.Array | int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: jax.Array, stack: jax.Array, layer: jax.Array | int, form: str) -> jax.Array:
    """x `[N, I]` times the transpose of `stack[layer]`, `[O, I]`, in the form of that name: float32 `[N, O]`."""
    if form == "xla":
        return xla.product(x, stack, (layer,))
    return gpu.product(x, stack, layer, interpreted=form == "triton_interpreted")


def _fwd(x: jax.Array, stack: jax.Array, layer: jax.Array | int, form: str) -> tuple[jax.Array, Residuals]:
    """A plain product: the other forms are for few rows, and cost the compiler much in a gradient."""
    w = lax.dynamic_index_in_dim(stack, layer, keepdims=False)
    return xla.dot(x, w), (x, stack, layer)


def _bwd(form: str, residuals: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """The gradient of the output is rounded to the dtype of x, as the output is where it is used."""
    x, stack, layer = residuals
    g = g.astype(x.dtype)
    w = lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(x.dtype)
    d_x = jnp.einsum("no,oi->ni", g, w, precision="highest", preferred_element_type=jnp.float32)
    d_w = jnp.einsum("no,ni->oi", g, x, precision="highest", preferred_element_type=jnp.float32)
    d_stack = d_w[None].astype(stack.dtype)
    if stack.shape[0] > 1:
        d_stack = lax.dynamic_update_slice_in_dim(jnp.zeros_like(stack), d_stack, layer, 0)
    return d_x.astype(x.dtype), d_stack, None


product.defvjp(_fwd, _bwd)
