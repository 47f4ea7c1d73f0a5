"""A limit on the tokens of an expert, counted over all devices: GShard's capacity with MiniMax's global router.

Counted by each device for itself, the limit would drop tokens on one device whose experts have room for those of
another (MiniMax-01, arXiv 2501.08313, section 2.2.2): so the counts are gathered before tokens are sent.
"""

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.sharding.region import gathered, index, split_over


def within_capacity(chosen: jax.Array, experts: int, capacity: float) -> jax.Array:
    """`chosen` with nobody for what goes beyond the capacity; the first tokens of the batch have precedence.

    An expert takes capacity · (valid choices of all devices) / experts tokens, rounded up. Which tokens are dropped
    does not depend on the mesh: those of later rows, and in a row the later ones.

    Args:
      chosen: int32 `[B, T, k]` of this device's tokens; `experts` is nobody.
      experts: E.
      capacity: 1 is room for every token if all experts are chosen alike.
    """
    B, T, k = chosen.shape
    flat = chosen.reshape(B, T * k)
    hits = jax.nn.one_hot(flat, experts, dtype=jnp.int32)  # [B, T·k, E], all 0 for nobody
    stretches = gathered(jnp.sum(hits, axis=1)[None], 0, "sequence")  # [devices, B, E]
    past = jnp.arange(stretches.shape[0]) < index(split_over("sequence"))
    earlier = jnp.sum(jnp.where(past[:, None, None], stretches, 0), axis=0)
    rows = gathered(jnp.sum(stretches, axis=0), 0, "batch")  # of all devices
    before = lax.dynamic_slice_in_dim(jnp.cumsum(rows, axis=0) - rows, index(split_over("batch")) * B, B)
    rank = jnp.cumsum(hits, axis=1) - 1 + (before + earlier)[:, None]
    limit = jnp.ceil(capacity * jnp.sum(rows) / experts)
    own_rank = jnp.take_along_axis(rank, jnp.minimum(flat, experts - 1)[..., None], axis=2)[..., 0]
    return jnp.where(own_rank < limit, flat, experts).reshape(B, T, k)
