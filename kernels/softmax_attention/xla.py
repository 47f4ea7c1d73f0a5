"""Softmax attention in blocks with a running maximum and sum (Milakov & Gimelshein, arXiv 1805.02867; Dao, 2205.14135).

Scores of one block of queries against one block of keys exist at a time, also in the gradient; blocks above the
diagonal and, in packed rows, blocks before every query's segment are skipped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Running (maximum [..., T], sum [..., T], weighted values [..., T, D]).
Running = tuple[jax.Array, jax.Array, jax.Array]


class Blocks(NamedTuple):
    """Sizes and numbers of the blocks; heads are H = K · G."""

    tq: int
    tk: int
    nq: int
    nk: int
    K: int
    G: int


def blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    q_block: int,
    k_block: int,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Shapes as in `reference.softmax_attention`."""
    return _blocked(q, k, v, offset, segments, q_block, k_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, q_block: int, k_block: int
) -> jax.Array:
    return _forward(q, k, v, offset, segments, q_block, k_block)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, q_block: int, k_block: int
) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, H, D]`, and the logarithm of each query's sum of exp(score) as blocks `[nq, B, K, G·tq]`."""
    T = q.shape[1]
    n = _sizes(q, k, q_block, k_block)
    queries = _to_blocks(q.astype(jnp.float32) * q.shape[3] ** -0.5, n)
    k, v = _pad_keys(k, n), _pad_keys(v, n)
    segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, k.shape[2] - segments.shape[1])))

    def one_query_block(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, queries = inputs
        position = offset[:, None] + index * n.tq + jnp.arange(n.tq)  # [B, tq]

        def attend(running: Running, j: jax.Array) -> Running:
            keys = lax.dynamic_slice_in_dim(k, j * n.tk, n.tk, 2).astype(jnp.float32)
            values = lax.dynamic_slice_in_dim(v, j * n.tk, n.tk, 2).astype(jnp.float32)
            scores = jnp.einsum("bkqd,bknd->bkqn", queries, keys, precision="highest")
            visible = _tile(_visible(position, segments, j, n), n.G)
            return _accumulate(running, jnp.where(visible, scores, -jnp.inf), values)

        def body(running: Running, j: jax.Array) -> tuple[Running, None]:
            return lax.cond(_needed(position, segments, j, n), attend, lambda running, _: running, running, j), None

        (maximum, total, values), _ = lax.scan(body, _empty(queries.shape[:3], q.shape[3]), jnp.arange(n.nk))
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
        return values / total[..., None], shift + jnp.log(total)

    out, log_sum = lax.map(one_query_block, (jnp.arange(n.nq), queries))
    return _from_blocks(out, n)[:, :T].astype(v.dtype), log_sum


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _blocked_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, q_block: int, k_block: int
) -> tuple[jax.Array, Residuals]:
    out, log_sum = _forward(q, k, v, offset, segments, q_block, k_block)
    return out, (q, k, v, offset, segments, out, log_sum)


def _blocked_bwd(
    q_block: int, k_block: int, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    """Scores are made again block by block (Dao et al., arXiv 2205.14135, algorithm 4)."""
    q, k, v, offset, segments, out, log_sum = residuals
    (_, T, _, D), N = q.shape, k.shape[2]
    n = _sizes(q, k, q_block, k_block)
    scale = D**-0.5
    queries, d_out_blocks = _to_blocks(q.astype(jnp.float32) * scale, n), _to_blocks(d_out.astype(jnp.float32), n)
    # Σ_n p_n dp_n of each query, from what is at hand.
    delta = jnp.sum(_to_blocks(out.astype(jnp.float32), n) * d_out_blocks, -1)
    keys, values = (_pad_keys(x, n) for x in (k, v))
    segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, keys.shape[2] - N)))

    def query_block(d_kv: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        index, query, d_o, lse, row_delta = inputs
        position = offset[:, None] + index * n.tq + jnp.arange(n.tq)

        def block(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            key = lax.dynamic_slice_in_dim(keys, j * n.tk, n.tk, 2).astype(jnp.float32)
            value = lax.dynamic_slice_in_dim(values, j * n.tk, n.tk, 2).astype(jnp.float32)
            scores = jnp.einsum("bkqd,bknd->bkqn", query, key, precision="highest")
            visible = _tile(_visible(position, segments, j, n), n.G)
            p = jnp.exp(jnp.where(visible, scores - lse[..., None], -jnp.inf))
            d_p = jnp.einsum("bkqd,bknd->bkqn", d_o, value, precision="highest")
            d_s = p * (d_p - row_delta[..., None])
            return (
                jnp.einsum("bkqn,bknd->bkqd", d_s, key, precision="highest"),
                jnp.einsum("bkqn,bkqd->bknd", d_s, query, precision="highest"),
                jnp.einsum("bkqn,bkqd->bknd", p, d_o, precision="highest"),
            )

        def nothing(_: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            empty = jnp.zeros((*keys.shape[:2], n.tk, D), jnp.float32)
            return jnp.zeros_like(query), empty, empty

        def body(carry: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            d_q, d_k, d_v = carry
            # The sums stay outside the branches, which would copy them whole.
            more_q, more_k, more_v = lax.cond(_needed(position, segments, j, n), block, nothing, j)
            return (d_q + more_q, _add_at(d_k, more_k, j * n.tk), _add_at(d_v, more_v, j * n.tk)), None

        (d_q, d_k, d_v), _ = lax.scan(body, (jnp.zeros_like(query), *d_kv), jnp.arange(n.nk))
        return (d_k, d_v), d_q

    zeros = jnp.zeros(keys.shape, jnp.float32)
    inputs = (jnp.arange(n.nq), queries, d_out_blocks, log_sum, delta)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), inputs)
    d_q = _from_blocks(d_q, n)[:, :T] * scale
    return d_q.astype(q.dtype), d_k[:, :, :N].astype(k.dtype), d_v[:, :, :N].astype(v.dtype), None, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _add_at(x: jax.Array, more: jax.Array, first: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, first, more.shape[2], 2) + more, first, 2)


def _sizes(q: jax.Array, k: jax.Array, q_block: int, k_block: int) -> Blocks:
    (_, T, H, _), (_, K, N, _) = q.shape, k.shape
    tq, tk = min(q_block, T), min(k_block, N)
    return Blocks(tq, tk, -(-T // tq), -(-N // tk), K, H // K)


def _to_blocks(x: jax.Array, n: Blocks) -> jax.Array:
    """`[B, T, H, D]` to `[nq, B, K, G·tq, D]`, zeros at the end; queries are ordered (group, token)."""
    B, T, _, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, n.nq * n.tq - T), (0, 0), (0, 0)))
    x = x.reshape(B, n.nq, n.tq, n.K, n.G, D).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(n.nq, B, n.K, n.G * n.tq, D)


def _from_blocks(x: jax.Array, n: Blocks) -> jax.Array:
    """The inverse of `_to_blocks`, with the zeros."""
    B, D = x.shape[1], x.shape[4]
    x = x.reshape(n.nq, B, n.K, n.G, n.tq, D).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, n.nq * n.tq, n.K * n.G, D)


def _pad_keys(x: jax.Array, n: Blocks) -> jax.Array:
    """Zeros at the end of `[B, K, N, D]`; they stay invisible, as their positions are past every query's."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, n.nk * n.tk - x.shape[2]), (0, 0)))


def _visible(position: jax.Array, segments: jax.Array | None, j: jax.Array, n: Blocks) -> jax.Array:
    """Which keys of block j the queries at `position` `[B, tq]` see: bool `[B, tq, tk]`."""
    visible = (j * n.tk + jnp.arange(n.tk)) <= position[..., None]
    if segments is None:
        return visible
    theirs = lax.dynamic_slice_in_dim(segments, j * n.tk, n.tk, 1)
    return visible & (theirs[:, None] == _own(position, segments)[..., None])


def _own(position: jax.Array, segments: jax.Array) -> jax.Array:
    """The segments at `position`, which is past the end for queries that are padding."""
    return jnp.take_along_axis(segments, position, axis=1, mode="clip")


def _tile(visible: jax.Array, G: int) -> jax.Array:
    return jnp.tile(visible, (1, G, 1))[:, None]


def _needed(position: jax.Array, segments: jax.Array | None, j: jax.Array, n: Blocks) -> jax.Array:
    """Whether any query sees any key of block j."""
    below = j * n.tk <= jnp.max(position[:, -1])
    if segments is None:
        return below
    # Segments lie in one piece, so that one which is neither a query's nor a key's last is that of all between.
    theirs = lax.dynamic_slice_in_dim(segments, j * n.tk, n.tk, 1)
    return below & jnp.any(theirs[:, -1:] == _own(position, segments)) | _overlaps(position, j, n)


def _overlaps(position: jax.Array, j: jax.Array, n: Blocks) -> jax.Array:
    first, last = j * n.tk, (j + 1) * n.tk - 1
    return (first <= jnp.max(position[:, -1])) & (last >= jnp.min(position[:, 0]))


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


@jax.checkpoint  # the gradient makes the scores again: those of all layers together would fill the memory
def direct(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Few queries: all scores at once, `[B, K, T·G, N]`."""
    B, T, H, D = q.shape
    K, N = k.shape[1:3]
    G = H // K
    q = (q.astype(jnp.float32) * D**-0.5).reshape(B, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, D)
    scores = jnp.einsum("bkqd,bknd->bkqn", q, k.astype(jnp.float32), precision="highest")
    position = jnp.repeat(offset[:, None] + jnp.arange(T), G, axis=1)  # [B, T·G]
    visible = jnp.arange(N) <= position[..., None]
    if segments is not None:
        visible &= segments[:, None] == _own(position, segments)[..., None]
    p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkqn,bknd->bkqd", p, v.astype(jnp.float32), precision="highest")
    return out.reshape(B, K, T, G, D).transpose(0, 2, 1, 3, 4).reshape(B, T, H, D).astype(v.dtype)
