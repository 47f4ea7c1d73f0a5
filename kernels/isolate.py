"""Keeps XLA:CPU from moving work into or out of a piece of a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.varying import alike


def isolated(fn: Callable[..., Any], index: jax.Array | int, *operands: Any) -> Any:
    """`fn(*operands)`; on CPUs inside a branch that is always taken, though the compiler cannot know.

    A branch reads and returns whole buffers. So what made an operand is not computed again for each element that uses
    it, a result is not computed twice, and bfloat16 weights are not converted to float32 ahead of the loop, all layers'
    at once. `optimization_barrier` is dropped before these passes run. `index` is any integer of the loop
    that is not negative whatever the arguments are: with a negative one the result is zeros.
    """

    def in_branch(*operands: Any) -> Any:
        taken = lax.optimization_barrier(jnp.asarray(index, jnp.int32)) >= 0
        like, *_ = jax.tree.leaves(operands)
        empty = jax.tree.map(lambda a: jnp.zeros_like(like, a.dtype, a.shape), jax.eval_shape(fn, *operands))
        return lax.cond(taken, fn, lambda *_: empty, *operands)

    index, operands = alike(index, operands)
    return lax.platform_dependent(*operands, cpu=in_branch, default=fn)
