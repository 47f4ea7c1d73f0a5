"""The segments of packed rows: each is a run of tokens with one id ≥ 1; an id that comes again is another segment."""

import jax
import jax.numpy as jnp


def runs(segments: jax.Array) -> jax.Array:
    """Segment ids `[B, T]` of whole rows, numbered from 1 in order, int32; 0 for padding. No two have one number."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    start = (segments != before) & (segments > 0)
    return jnp.where(segments > 0, jnp.cumsum(start, axis=1, dtype=jnp.int32), 0)
