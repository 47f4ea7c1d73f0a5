"""Experts on sorted tokens, in blocks of R rows: each block belongs to one expert and reads that expert's weights.

A block may reach past the end of its expert's rows; the rows beyond are computed in vain and written again by the
block of the expert they belong to, which comes later.
"""

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.linear.api import dot


def blocked(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array | int,
    chosen: jax.Array,
    weights: jax.Array,
    rows: int,
) -> jax.Array:
    """Arguments as in `reference.experts`; `rows` is R."""
    N, k = chosen.shape
    E, F, M = gate_up.shape[1], gate_up.shape[3], x.shape[1]
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # [N·k]
    expert, start, used = _blocks(flat, E, rows)
    # Rows of one block past the end stay inside the padding.
    tokens = jnp.pad(order // k, (0, rows))
    share = jnp.pad(weights.reshape(-1)[order], (0, rows))

    def compute(out: jax.Array, e: jax.Array, first: jax.Array) -> jax.Array:
        block = x[lax.dynamic_slice_in_dim(tokens, first, rows)]
        w13 = lax.dynamic_slice(gate_up, (layer, e, 0, 0, 0), (1, 1, 2, F, M)).reshape(2 * F, M)
        gate, up = jnp.split(dot(block, w13), 2, axis=1)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        w2 = lax.dynamic_slice(down, (layer, e, 0, 0), (1, 1, M, F)).reshape(M, F)
        y = dot(hidden, w2) * lax.dynamic_slice_in_dim(share, first, rows)[:, None]
        return lax.dynamic_update_slice(out, y, (first, 0))

    def body(out: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        e, first, needed = block
        # The branch also keeps XLA:CPU from converting every expert's bfloat16 weights ahead of the loop.
        return lax.cond(needed, compute, lambda out, *_: out, out, e, first), None

    out = jnp.zeros((N * k + rows, M), jnp.float32)
    out, _ = lax.scan(body, out, (expert, start, used))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype), unique_indices=True)
    return jnp.sum(out[place].reshape(N, k, M), axis=1)


def _blocks(flat: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which expert each block belongs to, its first sorted row, and whether it is needed; all `[blocks]`.

    At most Nk/R + E blocks can be needed, or one for each row if that is fewer.
    """
    counts = jnp.bincount(flat, length=experts)  # entries equal to `experts` chose nobody and sort last
    per_expert = -(-counts // rows)
    last = jnp.cumsum(per_expert)
    n = min(flat.shape[0], flat.shape[0] // rows + experts)
    index = jnp.arange(n)
    expert = jnp.minimum(jnp.searchsorted(last, index, side="right"), experts - 1)
    start = (jnp.cumsum(counts) - counts)[expert] + (index - (last - per_expert)[expert]) * rows
    needed = index < last[-1]
    return expert, jnp.where(needed, start, 0), needed
