"""Softmax attention in blocks with a running maximum and sum (Milakov & Gimelshein, arXiv 1805.02867; Dao, 2205.14135).

Scores of one block of queries against one block of keys exist at a time; blocks above the diagonal are skipped.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Running (maximum [..., T], sum [..., T], weighted values [..., T, D]).
Running = tuple[jax.Array, jax.Array, jax.Array]


def blocked(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """Shapes as in `reference.softmax_attention`."""
    B, T, H, D = q.shape
    K, N = k.shape[1:3]
    G = H // K
    tq, tk = min(q_block, T), min(k_block, N)
    nq, nk = -(-T // tq), -(-N // tk)
    queries = jnp.pad(q.astype(jnp.float32) * D**-0.5, ((0, 0), (0, nq * tq - T), (0, 0), (0, 0)))
    queries = queries.reshape(B, nq, tq, K, G, D).transpose(1, 0, 3, 4, 2, 5).reshape(nq, B, K, G * tq, D)
    # Padding at the end of the keys stays invisible: its positions are past every query's.
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, nk * tk - N), (0, 0))) for x in (k, v))

    def one_query_block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, queries = inputs
        position = offset[:, None] + index * tq + jnp.arange(tq)  # [B, tq]
        last = jnp.max(position[:, -1])

        @jax.checkpoint
        def attend(running: Running, j: jax.Array) -> Running:
            keys = lax.dynamic_slice_in_dim(k, j * tk, tk, 2).astype(jnp.float32)
            values = lax.dynamic_slice_in_dim(v, j * tk, tk, 2).astype(jnp.float32)
            scores = jnp.einsum("bkqd,bknd->bkqn", queries, keys, precision="highest")
            visible = (j * tk + jnp.arange(tk)) <= position[..., None]  # [B, tq, tk]
            visible = jnp.tile(visible, (1, G, 1))[:, None]  # queries are ordered (group, token)
            return _accumulate(running, jnp.where(visible, scores, -jnp.inf), values)

        def body(running: Running, j: jax.Array) -> tuple[Running, None]:
            return lax.cond(j * tk <= last, attend, lambda running, _: running, running, j), None

        (_, total, values), _ = lax.scan(body, _empty((B, K, G * tq), D), jnp.arange(nk))
        return values / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]

    out = lax.map(one_query_block, (jnp.arange(nq), queries))  # [nq, B, K, G·tq, D]
    out = out.reshape(nq, B, K, G, tq, D).transpose(1, 0, 4, 2, 3, 5).reshape(B, nq * tq, H, D)
    return out[:, :T].astype(v.dtype)


def _empty(shape: tuple[int, ...], D: int) -> Running:
    return jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, D), jnp.float32)


def _accumulate(running: Running, scores: jax.Array, values: jax.Array) -> Running:
    """Adds a block of masked scores `[B, K, T, N]` and values `[B, K, N, D]`."""
    maximum, total, weighted = running
    new = jnp.maximum(maximum, jnp.max(scores, -1))
    shift = jnp.where(jnp.isneginf(new), 0.0, new)  # a row that has seen nothing yet
    p = jnp.exp(scores - shift[..., None])
    scale = jnp.exp(maximum - shift)
    total = total * scale + jnp.sum(p, -1)
    return new, total, weighted * scale[..., None] + jnp.einsum("bkqn,bknd->bkqd", p, values, precision="highest")


def direct(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array) -> jax.Array:
    """Few queries: all scores at once, `[B, K, T·G, N]`."""
    B, T, H, D = q.shape
    K, N = k.shape[1:3]
    G = H // K
    q = (q.astype(jnp.float32) * D**-0.5).reshape(B, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, D)
    scores = jnp.einsum("bkqd,bknd->bkqn", q, k.astype(jnp.float32), precision="highest")
    position = jnp.repeat(offset[:, None] + jnp.arange(T), G, axis=1)  # [B, T·G]
    visible = jnp.arange(N) <= position[..., None]
    p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkqn,bknd->bkqd", p, v.astype(jnp.float32), precision="highest")
    return out.reshape(B, K, T, G, D).transpose(0, 2, 1, 3, 4).reshape(B, T, H, D).astype(v.dtype)
