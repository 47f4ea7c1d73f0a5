"""Softmax attention in blocks with a running maximum and sum (Milakov & Gimelshein, arXiv 1805.02867; Dao, 2205.14135).

Scores of one block of queries against one block of keys exist at a time, also in the gradient; blocks above the
diagonal and, in packed rows, blocks before every query's segment are skipped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.rounding import rounded
from m1jax.kernels.softmax_attention.pages import in_order

MOST_BLOCKS = 64  # of pages, for a few queries

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
    N: int  # keys without the padding of the last block


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


class Packed(NamedTuple):
    """Segment ids int32 of packed rows: of the keys, `[B, N]`, and of the queries, `[B, T]`."""

    keys: jax.Array
    queries: jax.Array


def _pack(q: jax.Array, offset: jax.Array, segments: jax.Array | None) -> Packed | None:
    if segments is None:
        return None
    return Packed(segments, _own(offset[:, None] + jnp.arange(q.shape[1]), segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, q_block: int, k_block: int
) -> jax.Array:
    return rounded(forward(q, k, v, offset, _pack(q, offset, segments), q_block, k_block)[0], v.dtype)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, packed: Packed | None, q_block: int, k_block: int
) -> tuple[jax.Array, jax.Array]:
    """As `api.over_part`, of the keys `[B, K, N, D]` of one layer."""
    n = _sizes(q, k, q_block, k_block)
    k, v = _pad_keys(k, n), _pad_keys(v, n)

    def block_of(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = (lax.dynamic_slice_in_dim(x, j * n.tk, n.tk, 2) for x in (k, v))
        return keys, values

    # Products of bfloat16 are exact in float32; the weights of the values are rounded to it. No CPU multiplies float16
    # fast: it is not worth a form of its own.
    kind = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    return _forward(q.astype(kind), block_of, offset, _pad_segments(packed, n), n)


def in_pages(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    layer: jax.Array | int,
    pages: jax.Array,
    q_block: int,
    k_block: int,
    few: bool,
) -> jax.Array:
    """`blocked` of keys and values in pages, as for `api.softmax_attention`: what no query sees is not read.

    Of a `few` queries all is float32, as in `direct`, and blocks are so large that it takes no time to skip them.
    """
    (_, T, H, _), (_, _, K, P, _), m = q.shape, k.shape, pages.shape[1]
    at_once = min(m, max(1, k_block // P, -(-m // MOST_BLOCKS) if few else 1))  # pages of a block
    tq = min(q_block, T)
    n = Blocks(tq, at_once * P, -(-T // tq), -(-m // at_once), K, H // K, m * P)
    pages = jnp.pad(pages, ((0, 0), (0, n.nk * at_once - m)))

    def block_of(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        some = lax.dynamic_slice_in_dim(pages, j * at_once, at_once, 1)
        return in_order(k, some, layer), in_order(v, some, layer)

    kind = jnp.bfloat16 if q.dtype == jnp.bfloat16 and not few else jnp.float32
    return rounded(_forward(q.astype(kind), block_of, offset, None, n)[0], v.dtype)


def _forward(
    q: jax.Array,
    block_of: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    offset: jax.Array,
    packed: Packed | None,
    n: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """As `forward`, in the dtype of q; `block_of` gives keys and values `[B, K, tk, D]` of a block."""
    T, kind, scale = q.shape[1], q.dtype, q.shape[3] ** -0.5
    queries = _to_blocks(q, n)

    def one_query_block(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, queries = inputs
        segments = _of_queries(packed, index, n)
        position = offset[:, None] + index * n.tq + jnp.arange(n.tq)  # [B, tq]

        def attend(running: Running, j: jax.Array) -> Running:
            keys, values = (x.astype(kind) for x in block_of(j))
            scores = _dot("bkqd,bknd->bkqn", queries, keys) * scale
            visible = _tile(_visible(position, segments, j, n), n.G)
            return _accumulate(running, jnp.where(visible, scores, -jnp.inf), values)

        def body(running: Running, j: jax.Array) -> tuple[Running, None]:
            return lax.cond(_needed(position, segments, j, n), attend, lambda running, _: running, running, j), None

        (maximum, total, values), _ = lax.scan(body, _empty(queries), jnp.arange(n.nk))
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        return values / total[..., None], jnp.where(seen, maximum + jnp.log(total), -jnp.inf)

    out, log_sum = lax.map(one_query_block, (jnp.arange(n.nq), queries))
    return _from_blocks(out, n)[:, :T], _from_blocks(log_sum[..., None], n)[:, :T, :, 0]


def tied(*arrays: Any) -> Any:
    """The arrays, none of them before all are there, for what is differentiated in a loop over layers.

    In such a gradient JAX computes ahead of the loop what does not hang on the layer: of the loops in here every
    block's mask, all of them at once. So masks are made to hang on the queries.
    """
    return lax.optimization_barrier(arrays)


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _blocked_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, q_block: int, k_block: int
) -> tuple[jax.Array, Residuals]:
    given = (q, k, v, offset, segments)
    q, k, v, offset, segments = tied(*given)
    out, log_sum = forward(q, k, v, offset, _pack(q, offset, segments), q_block, k_block)
    out = rounded(out, v.dtype)
    return out, (*given, out, log_sum)


def _blocked_bwd(
    q_block: int, k_block: int, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, offset, segments, out, log_sum = residuals
    packed = _pack(q, offset, segments)
    gradients = backward(q, k, v, offset, packed, out, log_sum, d_out, q_block, k_block)
    d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True))
    return d_q, d_k, d_v, None, None


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    packed: Packed | None,
    out: jax.Array,
    log_sum: jax.Array,
    d_out: jax.Array,
    q_block: int,
    k_block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, k and v, float32, where `out`, `log_sum`, `d_out` are of all keys.

    Scores are made again block by block (Dao et al., arXiv 2205.14135, algorithm 4).
    """
    (_, T, _, D), N = q.shape, k.shape[2]
    n = _sizes(q, k, q_block, k_block)
    scale = D**-0.5
    queries, d_out_blocks = _to_blocks(q.astype(jnp.float32) * scale, n), _to_blocks(d_out.astype(jnp.float32), n)
    # Σ_n p_n dp_n of each query, from what is at hand.
    delta = jnp.sum(_to_blocks(out.astype(jnp.float32), n) * d_out_blocks, -1)
    keys, values, packed = _pad_keys(k, n), _pad_keys(v, n), _pad_segments(packed, n)
    # A query that is padding or has seen nothing has no weight anywhere.
    sums = _to_blocks(jnp.where(jnp.isneginf(log_sum), jnp.inf, log_sum)[..., None], n)[..., 0]

    def query_block(d_kv: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        index, query, d_o, lse, row_delta = inputs
        segments = _of_queries(packed, index, n)
        position = offset[:, None] + index * n.tq + jnp.arange(n.tq)

        def block(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            key = lax.dynamic_slice_in_dim(keys, j * n.tk, n.tk, 2).astype(jnp.float32)
            value = lax.dynamic_slice_in_dim(values, j * n.tk, n.tk, 2).astype(jnp.float32)
            scores = _dot("bkqd,bknd->bkqn", query, key)
            visible = _tile(_visible(position, segments, j, n), n.G)
            p = jnp.exp(jnp.where(visible, scores - lse[..., None], -jnp.inf))
            d_p = _dot("bkqd,bknd->bkqn", d_o, value)
            d_s = p * (d_p - row_delta[..., None])
            return (
                _dot("bkqn,bknd->bkqd", d_s, key),
                _dot("bkqn,bkqd->bknd", d_s, query),
                _dot("bkqn,bkqd->bknd", p, d_o),
            )

        def nothing(_: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            empty = jnp.zeros_like(query, shape=(*keys.shape[:2], n.tk, D))
            return jnp.zeros_like(query), empty, empty

        def body(carry: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            d_q, d_k, d_v = carry
            # The sums stay outside the branches, which would copy them whole.
            more_q, more_k, more_v = lax.cond(_needed(position, segments, j, n), block, nothing, j)
            return (d_q + more_q, _add_at(d_k, more_k, j * n.tk), _add_at(d_v, more_v, j * n.tk)), None

        (d_q, d_k, d_v), _ = lax.scan(body, (jnp.zeros_like(query), *d_kv), jnp.arange(n.nk))
        return (d_k, d_v), d_q

    zeros = jnp.zeros_like(keys, jnp.float32)
    inputs = (jnp.arange(n.nq), queries, d_out_blocks, sums, delta)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), inputs)
    d_q = _from_blocks(d_q, n)[:, :T] * scale
    return d_q, d_k[:, :, :N], d_v[:, :, :N]


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _add_at(x: jax.Array, more: jax.Array, first: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, first, more.shape[2], 2) + more, first, 2)


def _sizes(q: jax.Array, k: jax.Array, q_block: int, k_block: int) -> Blocks:
    (_, T, H, _), (_, K, N, _) = q.shape, k.shape
    tq, tk = min(q_block, T), min(k_block, N)
    return Blocks(tq, tk, -(-T // tq), -(-N // tk), K, H // K, N)


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
    """Zeros at the end of `[B, K, N, D]`."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, n.nk * n.tk - x.shape[2]), (0, 0)))


def _pad_segments(packed: Packed | None, n: Blocks) -> Packed | None:
    if packed is None:
        return None
    keys, queries = packed
    return Packed(
        jnp.pad(keys, ((0, 0), (0, n.nk * n.tk - keys.shape[1])), mode="edge"),
        jnp.pad(queries, ((0, 0), (0, n.nq * n.tq - queries.shape[1]))),
    )


def _of_queries(packed: Packed | None, index: jax.Array, n: Blocks) -> Packed | None:
    """The same with the segments of one block of queries, `[B, tq]`."""
    if packed is None:
        return None
    return Packed(packed.keys, lax.dynamic_slice_in_dim(packed.queries, index * n.tq, n.tq, 1))


def _visible(position: jax.Array, segments: Packed | None, j: jax.Array, n: Blocks) -> jax.Array:
    """Which keys of block j the queries at `position` `[B, tq]` see: bool `[B, tq, tk]`."""
    key = j * n.tk + jnp.arange(n.tk)
    visible = (key <= position[..., None]) & (key < n.N)
    if segments is None:
        return visible
    theirs = lax.dynamic_slice_in_dim(segments.keys, j * n.tk, n.tk, 1)
    return visible & (theirs[:, None] == segments.queries[..., None])


def _own(position: jax.Array, segments: jax.Array) -> jax.Array:
    """The segments at `position`, which is past the end for queries that are padding."""
    return jnp.take_along_axis(segments, position, axis=1, mode="clip")


def _tile(visible: jax.Array, G: int) -> jax.Array:
    return jnp.tile(visible, (1, G, 1))[:, None]


def _needed(position: jax.Array, segments: Packed | None, j: jax.Array, n: Blocks) -> jax.Array:
    """Whether any query sees any key of block j."""
    below = j * n.tk <= jnp.max(position[:, -1])
    if segments is None:
        return below
    # Segments lie in one piece, so that one which is neither a query's nor a key's last is that of all between.
    theirs = lax.dynamic_slice_in_dim(segments.keys, j * n.tk, n.tk, 1)
    return below & jnp.any(theirs[:, -1:] == segments.queries) | _overlaps(position, j, n)


def _overlaps(position: jax.Array, j: jax.Array, n: Blocks) -> jax.Array:
    first, last = j * n.tk, (j + 1) * n.tk - 1
    return (first <= jnp.max(position[:, -1])) & (last >= jnp.min(position[:, 0]))


def _empty(queries: jax.Array) -> Running:
    nothing = jnp.zeros_like(queries, jnp.float32)  # varying over the mesh axes that the queries vary over
    return jnp.full_like(nothing[..., 0], -jnp.inf), nothing[..., 0], nothing


def _accumulate(running: Running, scores: jax.Array, values: jax.Array) -> Running:
    """Adds a block of masked scores `[B, K, T, N]` and values `[B, K, N, D]`."""
    maximum, total, weighted = running
    new = jnp.maximum(maximum, jnp.max(scores, -1))
    shift = jnp.where(jnp.isneginf(new), 0.0, new)  # a row that has seen nothing yet
    p = jnp.exp(scores - shift[..., None])
    scale = jnp.exp(maximum - shift)
    total = total * scale + jnp.sum(p, -1)
    return new, total, weighted * scale[..., None] + _dot("bkqn,bknd->bkqd", rounded(p, values.dtype), values)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32."""
    return jnp.einsum(spec, a, b, precision="highest", preferred_element_type=jnp.float32)


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
    return rounded(out.reshape(B, K, T, G, D).transpose(0, 2, 1, 3, 4).reshape(B, T, H, D), v.dtype)


def direct_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    block: int,
    segments: jax.Array | None = None,
) -> jax.Array:
    """`direct`, of so many queries at a time (at least one), so that each is what it is alone."""
    T, block = q.shape[1], max(1, block)
    if block >= T:
        return direct(q, k, v, offset, segments)
    n = -(-T // block)
    queries = jnp.pad(q, ((0, 0), (0, n * block - T), (0, 0), (0, 0)))
    queries = jnp.moveaxis(queries.reshape(q.shape[0], n, block, *q.shape[2:]), 1, 0)
    out = lax.map(lambda one: direct(one[1], k, v, offset + one[0] * block, segments), (jnp.arange(n), queries))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], n * block, *q.shape[2:])[:, :T]
