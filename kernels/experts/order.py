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


def table_of_tiles(counts: jax.Array, begins: jax.Array, R: int, most: int, span: int) -> jax.Array:
    """Cuts each bucket's rows, `counts` from `begins` on, into tiles of R: int32 `[most, 5]`.

    An entry is bucket, first row, rows, and first tile and size of the span of up to `span` tiles of this bucket that
    it is in. Tiles that are not needed come last, without rows, each a span of its own.
    """
    tiles = -(-counts // R)
    last = jnp.cumsum(tiles)
    index = jnp.arange(most, dtype=jnp.int32)
    bucket = jnp.minimum(jnp.searchsorted(last, index, side="right"), counts.shape[0] - 1)
    among = index - (last - tiles)[bucket]
    first = index - among % span
    size = jnp.minimum(span, last[bucket] - first)
    entry = (bucket, begins[bucket] + among * R, jnp.clip(counts[bucket] - among * R, 0, R), first, size)
    none = jnp.zeros_like(index)
    spare = (none, none, none, index, none + 1)
    needed = index < last[-1]
    table = jnp.stack([jnp.where(needed, a, b) for a, b in zip(entry, spare, strict=True)], axis=1)
    return table.astype(jnp.int32)
