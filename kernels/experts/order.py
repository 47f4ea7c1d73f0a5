"""The order of assignments by expert, by counting instead of comparing.

A comparison sort of a few thousand ids takes a GPU's assembler seconds to compile, and the model needs a dozen of
them; counting is sums, which every device has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 128  # ids that are compared with each other


class Order(NamedTuple):
    """A stable order of ids, as of `argsort`."""

    order: jax.Array  # int32 [n], where each sorted id comes from
    place: jax.Array  # int32 [n], where each id goes: the inverse
    counts: jax.Array  # int32 [buckets], ids of each bucket


def by_bucket(ids: jax.Array, buckets: int) -> Order:
    """Orders ids `[n]` from 0 to `buckets`; those equal to `buckets` come last and are not counted."""
    (n,) = ids.shape
    blocks = -(-n // _BLOCK)
    size = -(-n // blocks)
    padded = jnp.pad(ids, (0, blocks * size - n), constant_values=buckets).reshape(blocks, size)
    same = padded[:, :, None] == padded[:, None, :]
    earlier = jnp.sum(same & jnp.tri(size, k=-1, dtype=bool), axis=2, dtype=jnp.int32)
    of_block = jnp.sum(padded[:, :, None] == jnp.arange(buckets + 1, dtype=ids.dtype), axis=1, dtype=jnp.int32)
    counts = jnp.sum(of_block, axis=0)
    first = (jnp.cumsum(of_block, axis=0) - of_block) + (jnp.cumsum(counts) - counts)
    place = (earlier + jnp.take_along_axis(first, padded, axis=1)).reshape(-1)[:n]
    order = jnp.zeros(n, jnp.int32).at[place].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    return Order(order, place, counts[:buckets])
