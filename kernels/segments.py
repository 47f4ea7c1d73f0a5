"""The segments of packed rows: each is a run of tokens with one id ≥ 1; an id that comes again is another segment."""

import jax
import jax.numpy as jnp
from jax import lax


def starts(segments: jax.Array) -> jax.Array:
    """Where a segment begins after the first token, bool `[B, T]`: that one goes on with a given state, if any."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return (segments != before) & (segments > 0) & (jnp.arange(segments.shape[1]) > 0)


def valid_and_starts(lengths: jax.Array, T: int, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Which of T tokens are no padding, by `lengths` `[B]` and `segments` `[B, T]`, and `starts`: bool `[B, T]`."""
    valid = jnp.arange(T) < lengths[:, None]
    if segments is None:
        return valid, jnp.zeros_like(valid)
    valid &= segments > 0
    return valid, starts(jnp.where(valid, segments, 0))


def numbered(segments: jax.Array) -> jax.Array:
    """Segment ids `[B, T]` of whole rows as int32 that grow; 0 for padding. No two segments have one number."""
    return jnp.where(segments > 0, 1 + jnp.cumsum(starts(segments), axis=1, dtype=jnp.int32), 0)


def positions(segments: jax.Array) -> jax.Array:
    """Positions int32 `[B, T]` that count from 0 in every segment of whole rows; of padding any."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    return index - lax.cummax(jnp.where(starts(segments), index, 0), axis=1)
