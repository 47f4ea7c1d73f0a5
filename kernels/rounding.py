"""Rounding to bfloat16 that happens where it is written.

Between the operations that it fuses XLA leaves out a cast to bfloat16 and back, in every program elsewhere. Decoding
and training would then differ by up to 2^-9 in each layer, and a token now and then go to other experts.
"""

from collections.abc import Callable

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
