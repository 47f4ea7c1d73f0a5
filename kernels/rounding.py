"""Rounding to bfloat16 that happens where it is written.

Between the operations that it fuses XLA leaves out a cast to bfloat16 and back, in every program elsewhere. Decoding
and training would then differ by up to 2^-9 in each layer, and a token now and then go to other experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in the dtype, whatever comes after."""
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def in_float32(fn: Callable[..., jax.Array], *operands: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """fn of the operands in float32, rounded once to `dtype`, or else to theirs."""
    kind = jnp.dtype(jnp.result_type(*operands) if dtype is None else dtype)
    if kind == jnp.float32:
        return fn(*operands)

    def compute(*operands: jax.Array) -> jax.Array:
        return rounded(fn(*(x.astype(jnp.float32) for x in operands)), kind)

    # The gradient keeps the operands as they are, not in float32. In a loop nothing could be merged.
    return jax.checkpoint(compute, prevent_cse=False)(*operands)


def mapped(fn: Callable[[Any, Any], jax.Array], weights: Any, parts: Any) -> jax.Array:
    """`lax.map` of `fn(weights, part)` over the leading axis of `parts`; gradients of `weights` are summed in float32.

    The loop's own sum is in the dtype of the weights: in bfloat16 it loses bits with every part.
    """
    leaves, tree = jax.tree.flatten(weights)
    sums = [_zeros(w) if jnp.issubdtype(w.dtype, jnp.floating) else None for w in leaves]

    def one(part: Any) -> jax.Array:
        added = [w if s is None else _adding(lax.stop_gradient(w), s) for w, s in zip(leaves, sums, strict=True)]
        return fn(jax.tree.unflatten(tree, added), part)

    return lax.map(one, parts)


@jax.custom_vjp
def _zeros(w: jax.Array) -> jax.Array:
    """In float32, for `_adding` alone: what it gathers becomes w's gradient."""
    return jnp.zeros_like(w, jnp.float32)


_zeros.defvjp(lambda w: (_zeros(w), jnp.zeros(0, w.dtype)), lambda like, d: (rounded(d, like.dtype),))


@jax.custom_vjp
def _adding(w: jax.Array, sums: jax.Array) -> jax.Array:
    """w; its gradient goes to `sums`."""
    return w


_adding.defvjp(lambda w, sums: (w, None), lambda _, d: (None, d.astype(jnp.float32)))
