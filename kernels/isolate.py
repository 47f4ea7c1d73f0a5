"""Keeps XLA:CPU from moving work into or out of a piece of a loop, and from computing it in another way elsewhere."""

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


def by_row(fn: Callable[..., Any], *operands: jax.Array, rows: int) -> Any:
    """`fn(*operands)` of arrays `[N, ...]`, floats first, each row by itself; on CPUs in blocks of so many rows.

    What comes of a row then does not hang on how many there are, nor on what is done with it: exp and sums in float32
    are else computed in one way for few numbers, in another for many, and in a third where they are fused.
    """

    def in_blocks(*operands: jax.Array) -> Any:
        N = operands[0].shape[0]
        blocks = -(-N // rows)

        def cut(a: jax.Array) -> jax.Array:
            padded = jnp.pad(a, ((0, blocks * rows - N), *((0, 0),) * (a.ndim - 1)))
            return padded.reshape(blocks, rows, *a.shape[1:])

        def block(operands: tuple[jax.Array, ...]) -> Any:
            first = operands[0].ravel()[0]
            return isolated(fn, (first == first).astype(jnp.int32), *operands)

        out = lax.map(block, tuple(cut(a) for a in operands))
        return jax.tree.map(lambda a: a.reshape(blocks * rows, *a.shape[2:])[:N], out)

    operands = alike(*operands)
    return lax.platform_dependent(*operands, cpu=in_blocks, default=fn)
