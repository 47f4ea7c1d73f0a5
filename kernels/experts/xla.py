"""Experts on sorted tokens, in blocks of R rows: each block belongs to one expert and reads that expert's weights.

A block may reach past the end of its expert's rows; the rows beyond are computed in vain and written again by the
block of the expert they belong to, which comes later.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.experts.order import by_bucket
from m1jax.kernels.experts.quantized import Weights, join_rows, product
from m1jax.kernels.rounding import rounded

MANY = 8  # rows of an expert on average, from which on a block of few is rare
EXACT = 4  # rows, from which on in bfloat16 each is bit by bit what it is among more


def blocked(
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array | int,
    chosen: jax.Array,
    weights: jax.Array,
    rows: int,
) -> jax.Array:
    """Arguments as in `reference.experts`; `rows` is R."""
    N, k = chosen.shape
    E, M = gate_up.shape[1], x.shape[1]
    flat = chosen.reshape(-1)
    order, place, counts = by_bucket(flat, E)
    blocks = blocks_of(counts, N * k, rows)
    # Rows of one block past the end stay inside the padding.
    tokens = jnp.pad(order // k, (0, rows))
    share = jnp.where(flat < E, weights.reshape(-1), 0.0)[order]  # the last block may reach into the padding
    share = jnp.pad(share, (0, rows))
    w13 = join_rows(gate_up)

    def compute(size: int, e: jax.Array, first: jax.Array) -> jax.Array:
        block = x[lax.dynamic_slice_in_dim(tokens, first, size)]
        gate, up = jnp.split(product(block, w13, (layer, e)), 2, axis=1)
        y = product(rounded(jax.nn.silu(gate) * up, x.dtype), down, (layer, e))
        y *= lax.dynamic_slice_in_dim(share, first, size)[:, None]
        return jnp.pad(y, ((0, rows - size), (0, 0)))

    # The product of few rows, one pass over the weights, sums in another order than that of more.
    fewest = EXACT if x.dtype == jnp.bfloat16 and N * k >= MANY * E else 1
    sizes = _sizes(rows, fewest)
    branches = [
        lambda *_: jnp.zeros_like(x, jnp.float32, (rows, M)),
        *(functools.partial(compute, size) for size in sizes),
    ]

    def body(out: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        e, first, count = block
        smallest = jnp.searchsorted(jnp.asarray((0, *sizes)), count)
        # The output stays outside the branches, which would copy it whole.
        return lax.dynamic_update_slice(out, lax.switch(smallest, branches, e, first), (first, 0)), None

    out, _ = lax.scan(body, jnp.zeros_like(x, jnp.float32, (N * k + rows, M)), blocks)
    return jnp.sum(out[place].reshape(N, k, M), axis=1)


def _sizes(rows: int, fewest: int) -> tuple[int, ...]:
    """Block sizes that are compiled: the last block of an expert takes the smallest that holds its rows."""
    parts = 16 if rows > 128 else 8
    return tuple(sorted({max(rows * part // parts, fewest) for part in range(1, parts + 1)}))


def blocks_of(counts: jax.Array, n: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which expert each block belongs to, its first sorted row, and how many rows it needs (0: none); all `[blocks]`.

    `counts` `[E]` are the rows of each expert, at most n in all, so that at most n/R + E blocks can be needed, or one
    for each row if that is fewer.
    """
    (experts,) = counts.shape
    per_expert = -(-counts // rows)
    last = jnp.cumsum(per_expert)
    index = jnp.arange(min(n, n // rows + experts))
    expert = jnp.minimum(jnp.searchsorted(last, index, side="right"), experts - 1)
    done = (index - (last - per_expert)[expert]) * rows  # rows of the expert in earlier blocks
    needed = index < last[-1]
    first = (jnp.cumsum(counts) - counts)[expert] + done
    # What needs no block is written past the end.
    return expert, jnp.where(needed, first, n), jnp.where(needed, jnp.minimum(counts[expert] - done, rows), 0)
