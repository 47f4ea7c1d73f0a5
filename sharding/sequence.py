"""Attention over a sequence whose tokens are split over devices; the ops of `m1jax.kernels` where they are not.

Each device holds one stretch of the tokens, and of the cache one stretch of the positions.

Lightning attention: the states that the stretches leave, `[D, D]` a head, are gathered once, and each device sums up
what comes before it (LASP-2, arXiv 2502.07563); where each has one token, the tokens are gathered instead. Softmax
attention: keys and values go round in a ring, and each device adds up the attention of its queries over one stretch
after another (Ring Attention, arXiv 2310.01889); stretches that lie ahead of all queries are skipped. Few queries
against a long cache stay, instead, where the cache is: they are gathered, and their attention over each stretch is put
together.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels import lightning_attention as lightning
from m1jax.kernels import softmax_attention as softmax
from m1jax.kernels.gpu import capability
from m1jax.kernels.rounding import rounded
from m1jax.kernels.segments import numbered, starts
from m1jax.kernels.softmax_attention import xla
from m1jax.kernels.softmax_attention.api import K_BLOCK, Q_BLOCK, over_part
from m1jax.kernels.softmax_attention.pages import in_order
from m1jax.sharding.region import Axes, block, gathered, index, size_of, split_over, total


def lightning_attention(
    qkv: jax.Array,
    log_decay: jax.Array,
    *,
    state: jax.Array | None,
    lengths: jax.Array,
    segments: jax.Array | None,
    layer: jax.Array | None = None,
    recurrent: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As the kernel of this name; T, `lengths` and `segments` are this device's, `state` that of the whole sequence.

    Its implementation is "recurrent" if asked for, else chosen by device and shape. The states in which devices begin
    come of chunks in any case, so that a device's tokens are decoding's to the bit on none but the first.

    The state before the first token comes in, the state after the last one goes out, on all devices alike.
    """
    over = split_over("sequence")
    alone = qkv.shape[1] == 1 and segments is None  # a step of decoding: its tokens are less than the states
    if alone:
        qkv, lengths = gathered(qkv, 1, "sequence"), total(lengths, "sequence")
    form = functools.partial(
        lightning.lightning_attention,
        qkv,
        log_decay,
        lengths=lengths,
        segments=segments,
        implementation="recurrent" if recurrent else None,
    )
    if alone or not over:
        out, after = form(state=state, layer=layer)
        return block(out, 1, "sequence") if alone else out, after
    if state is not None and layer is not None:
        out, after = lightning_attention(
            qkv, log_decay, state=state[layer], lengths=lengths, segments=segments, recurrent=recurrent
        )
        return out, state.at[layer].set(after)
    if state is None:
        B, _, H, _, D = qkv.shape
        state = jnp.zeros((B, H, D, D), jnp.float32)
    # Its outputs are not used, so that the compiler leaves out what only they need.
    own = lightning.lightning_attention(
        qkv, log_decay, state=None, lengths=lengths, segments=segments, implementation="xla"
    )[1]
    left = lax.all_gather(own, over)  # [n, B, H, D, D]
    starts_here, keeps = _borders(log_decay, lengths, segments, over)
    n = left.shape[0]
    stretch = jnp.arange(n)
    me = index(over)

    def before(i: jax.Array | int) -> jax.Array:
        """The state before stretch i: what each stretch left, times what those between keep of it."""
        between = (stretch[:, None] < stretch) & (stretch < i)  # [from, kept by]
        kept = jnp.prod(jnp.where(between[..., None, None], keeps[None], 1.0), axis=1)  # [n, B, H]
        kept = jnp.where((stretch < i)[:, None, None], kept, 0.0)
        first = jnp.prod(jnp.where((stretch < i)[:, None, None], keeps, 1.0), axis=0)  # [B, H]
        return jnp.einsum("nbh,nbhde->bhde", kept, left, precision="highest") + first[..., None, None] * state

    entering = jnp.where(starts_here[me][:, None, None, None], 0.0, before(me))
    return form(state=entering)[0], before(n)


def _borders(
    log_decay: jax.Array, lengths: jax.Array, segments: jax.Array | None, over: Axes
) -> tuple[jax.Array, jax.Array]:
    """Of each stretch, whether a segment begins with it, bool `[n, B]`, and what it keeps of the state, `[n, B, H]`."""
    if segments is None:
        counts = lax.all_gather(lengths, over)
        return jnp.zeros(counts.shape, bool), jnp.exp(log_decay * counts[..., None])
    segments = jnp.where(jnp.arange(segments.shape[1]) < lengths[:, None], segments, 0)
    inside, valid = jnp.any(starts(segments), axis=1), jnp.sum(segments > 0, axis=1)
    first, last, count, inside = lax.all_gather(
        jnp.stack([segments[:, 0], segments[:, -1], valid, inside.astype(jnp.int32)]), over, axis=1
    )
    previous = jnp.roll(last, 1, axis=0)
    begins = (first != previous) & (first > 0) & (jnp.arange(first.shape[0]) > 0)[:, None]
    keeps = jnp.exp(log_decay * count[..., None].astype(jnp.float32))
    return begins, jnp.where((begins | (inside > 0))[..., None], 0.0, keeps)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    offset: jax.Array | None = None,
    segments: jax.Array | None = None,
    layer: jax.Array | None = None,
    pages: jax.Array | None = None,
    recurrent: bool = False,
) -> jax.Array:
    """As the kernel of this name: q `[B, T, H, D]`, k and v `[B, K, N, D]`, `segments` `[B, T]` are this device's.

    With `layer` k and v are `[S, B, K, N, D]`, and with `pages`, which a split sequence has one of for each row,
    `[S, R, K, N, D]`. `offset` is the position of the first query of all devices. With
    `recurrent` each query is what decoding makes of it on a CPU, where one device has the whole sequence.
    """
    over = split_over("sequence")
    if not over:
        form = "direct" if recurrent and capability() is None else None
        return softmax.softmax_attention(
            q, k, v, offset=offset, segments=segments, layer=layer, pages=pages, implementation=form
        )
    if offset is None:
        offset = jnp.zeros(q.shape[:1], jnp.int32)
    T, H, K, N = q.shape[1], q.shape[2], *k.shape[-3:-1]
    # Queries and float32 outputs travel, or keys and values: whatever is less.
    if segments is None and T * H < N * K:
        return _gathered_queries(q, *((k[None], v[None], 0) if layer is None else (k, v, layer)), offset, pages, over)
    if layer is not None:
        k, v = (in_order(x, pages, layer) for x in (k, v))
    if segments is not None:
        segments = block(numbered(gathered(segments, 1, "sequence")), 1, "sequence")
    return _ring(q, k, v, offset, segments, over)


def _gathered_queries(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    offset: jax.Array,
    pages: jax.Array | None,
    over: Axes,
) -> jax.Array:
    """All devices' queries over this device's keys, then the parts put together."""
    everyone = lax.all_gather(q, over, axis=1, tiled=True)
    out, log_sum = over_part(everyone, k, v, offset - index(over) * k.shape[3], layer, pages)
    most = lax.pmax(lax.stop_gradient(log_sum), over)  # finite: every query sees itself
    weight = jnp.exp(log_sum - most)
    parts = jnp.concatenate([out * weight[..., None], weight[..., None]], axis=-1)
    whole = lax.psum_scatter(parts, over, scatter_dimension=1, tiled=True)
    return rounded(whole[..., :-1] / whole[..., -1:], v.dtype)


FAR = 1 << 30  # no cache is so long


class Stretch(NamedTuple):
    """What goes round in the ring."""

    k: jax.Array  # [B, K, N, D]
    v: jax.Array
    segments: jax.Array | None  # int32 [B, N]


def _packed(stretch: Stretch, segments: jax.Array | None) -> xla.Packed | None:
    return None if stretch.segments is None or segments is None else xla.Packed(stretch.segments, segments)


def _next(tree: Any, over: Axes) -> Any:
    """What the device before has of the same."""
    n = size_of(over)
    return jax.tree.map(lambda x: lax.ppermute(x, over, [(i, (i + 1) % n) for i in range(n)]), tree)


def _at(
    step: jax.Array | int, q: jax.Array, offset: jax.Array, stretch: Stretch, over: Axes
) -> tuple[jax.Array, jax.Array]:
    """The first query's position among the keys at hand after so many steps, `[B]`, and whether any is visible."""
    me, n = index(over), size_of(over)
    theirs = (me - step) % n
    first = offset + me * q.shape[1] - theirs * stretch.k.shape[2]
    return first, jnp.max(first) + q.shape[1] > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, over: Axes
) -> jax.Array:
    return rounded(_ring_forward(q, k, v, offset, segments, over)[0], v.dtype)


def _ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, over: Axes
) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, H, D]` and log of the sum of exp(score) `[B, T, H]`, float32."""

    def attend(stretch: Stretch, step: jax.Array | int, *sums: jax.Array) -> tuple[jax.Array, ...]:
        first, visible = _at(step, q, offset, stretch, over)

        def more(out: jax.Array, log_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
            packed = _packed(stretch, segments)
            part, part_sum = xla.forward(q, stretch.k, stretch.v, first, packed, Q_BLOCK, K_BLOCK)
            new = jnp.logaddexp(log_sum, part_sum)
            weight, part_weight = (jnp.exp(a - jnp.where(jnp.isneginf(new), 0.0, new)) for a in (log_sum, part_sum))
            return out * weight[..., None] + part * part_weight[..., None], new

        return lax.cond(visible, more, lambda *sums: sums, *sums)

    def body(carry: tuple[Stretch, jax.Array, jax.Array], step: jax.Array) -> tuple[Any, None]:
        stretch, *sums = carry
        coming = _next(stretch, over)  # travels while this stretch is attended to
        return (coming, *attend(stretch, step, *sums)), None

    n = size_of(over)
    empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    (stretch, *sums), _ = lax.scan(body, (Stretch(k, v, segments), *empty), jnp.arange(n - 1))
    out, log_sum = attend(stretch, n - 1, *sums)
    return out, log_sum


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _ring_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, segments: jax.Array | None, over: Axes
) -> tuple[jax.Array, Residuals]:
    out, log_sum = _ring_forward(*xla.tied(q, k, v, offset, segments), over)
    return rounded(out, v.dtype), (q, k, v, offset, segments, out, log_sum)


def _ring_bwd(over: Axes, residuals: Residuals, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    """Keys and values go round once more, with the sums of their gradients, which so come home."""
    q, k, v, offset, segments, out, log_sum = residuals

    def body(carry: tuple[Stretch, jax.Array, jax.Array, jax.Array], step: jax.Array) -> tuple[Any, None]:
        stretch, d_q, d_k, d_v = carry
        first, visible = _at(step, q, offset, stretch, over)

        def attend(d_q: jax.Array, d_k: jax.Array, d_v: jax.Array) -> tuple[jax.Array, ...]:
            packed = _packed(stretch, segments)
            more = xla.backward(q, stretch.k, stretch.v, first, packed, out, log_sum, d_out, Q_BLOCK, K_BLOCK)
            return d_q + more[0], d_k + more[1], d_v + more[2]

        d_q, d_k, d_v = lax.cond(visible, attend, lambda *parts: parts, d_q, d_k, d_v)
        stretch, d_k, d_v = _next((stretch, d_k, d_v), over)
        return (stretch, d_q, d_k, d_v), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    (_, d_q, d_k, d_v), _ = lax.scan(body, (Stretch(k, v, segments), *zeros), jnp.arange(size_of(over)))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


Pair = tuple[jax.Array, jax.Array]


def append(caches: Pair, new: Pair, n: jax.Array, first: jax.Array, pages: jax.Array | None) -> Pair:
    """Writes new `[B, K, T, D]` into layer n of each cache `[S, B, K, N, D]` from position first[b] of all devices on.

    With `pages` integers `[B, m]` caches are `[S, R, K, P, D]`, as for `softmax_attention`; tokens of which devices
    have a part each are in pages as long as a row.

    Positions past the end, and those whose page is none, are dropped. Padded tokens are written as well: the row's next
    tokens overwrite them before any query reaches them.
    """
    over = split_over("sequence")

    def written(caches: Pair, new: Pair, first: jax.Array) -> Pair:
        k, v = (_write(*both, n, first, pages) for both in zip(caches, new, strict=True))
        return k, v

    if not over:
        return written(caches, new, first)
    me, T, N = index(over), new[0].shape[2], caches[0].shape[3]
    if T * size_of(over) <= N:
        k, v = (lax.all_gather(x, over, axis=2, tiled=True) for x in new)
        return written(caches, (k, v), first - me * N)

    def body(carry: tuple[Pair, Pair], step: jax.Array) -> tuple[tuple[Pair, Pair], None]:
        caches, new = carry
        theirs = (me - step) % size_of(over)
        return (written(caches, new, first + theirs * T - me * N), _next(new, over)), None

    return lax.scan(body, (caches, new), jnp.arange(size_of(over)))[0][0]


def _write(
    cache: jax.Array, new: jax.Array, n: jax.Array, first: jax.Array, pages: jax.Array | None = None
) -> jax.Array:
    B, _, T, _ = new.shape
    R, P = cache.shape[1], cache.shape[3]
    position = first[:, None] + jnp.arange(T)  # [B, T]
    # Negative indices would count from the end. Of those dropped no two may be equal either.
    position = jnp.where(position < 0, FAR - position, position)
    page = jnp.arange(B)[:, None]
    if pages is not None:
        page = jnp.take_along_axis(pages.astype(jnp.int32), position // P, axis=1, mode="fill", fill_value=R)
        page = jnp.where((page >= 0) & (page < R), page, R + jnp.arange(B * T).reshape(B, T))
        position %= P
    return cache.at[n, page, :, position].set(new.swapaxes(1, 2), mode="drop", unique_indices=True)
