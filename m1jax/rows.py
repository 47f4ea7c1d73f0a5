"""The device's side of text generation: what a batch keeps between steps, and the compiled functions over it.

Keys and values of all texts lie in one pool of pages (`m1jax.pool`), which every step takes and gives back; all else
that a text leaves behind is a row of the batch. On a mesh a row stays on the devices that it began on.

Letters: B batch rows, T tokens of a chunk, n pages of a row, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.model import M1
from m1jax.params import STATE_AXES
from m1jax.sampling import ALTERNATIVES, SamplingRows, only, sample
from m1jax.sharding.region import everywhere, laid_out, on_mesh, on_mesh_of, ways
from m1jax.state import KVCache, LightningState, M1State
from m1jax.state import empty as empty_state

NOT_A_NUMBER = -1  # stands for a token where the logits were not finite
FREE = -1  # stands for a forced token where none is forced

_LENGTH, _S, _CACHE = STATE_AXES["length"], STATE_AXES["lightning.s"], STATE_AXES["cache.k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Left:
    """What rows have left behind but for keys and values: lightning states, and tokens seen, int32 `[B]`."""

    lightning: LightningState
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """Prompts that were read: logits float32 `[B, V]` after each one's last token."""

    logits: jax.Array
    left: Left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """The next token of each row, int32 `[B]`, `NOT_A_NUMBER` where logits were not finite.

    Where it is asked for, float32 `[B]` the logarithm of its probability by the model, before temperature and filters,
    and the K most probable tokens, int32 `[B, K]`, with theirs.
    """

    token: jax.Array
    logprob: jax.Array | None = None
    best: jax.Array | None = None
    best_logprob: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch between two steps.

    `token` int32 `[B]` was chosen last and is not yet in what is `left`; `seen` bool `[B, V]` marks the tokens of each
    prompt and text so far.
    """

    left: Left
    token: jax.Array
    seen: jax.Array
    sampling: SamplingRows


def _step(
    model: M1, tokens: jax.Array, lengths: jax.Array, left: Left, cache: KVCache, pages: jax.Array
) -> tuple[jax.Array, Left, KVCache]:
    state = M1State(left.lightning, cache, left.length, pages)
    logits, state = model.step(tokens, state, lengths=lengths, logits="last")
    return logits, Left(state.lightning, state.length), state.cache


@functools.partial(jax.jit, donate_argnames=("read", "cache"))
def prefill(
    model: M1, tokens: jax.Array, lengths: jax.Array, read: Read, cache: KVCache, pages: jax.Array
) -> tuple[Read, KVCache]:
    """Reads a chunk `[B, T]` of each prompt; a row with nothing left (length 0) keeps its state and logits."""
    new, left, cache = _step(model, tokens, lengths, read.left, cache, pages)
    return Read(jnp.where(lengths[:, None] > 0, new, read.logits), left), cache


@jax.jit
def pick(reads: tuple[Read, ...], source: jax.Array) -> Read:
    """The given rows int32 `[B]` of all prompts read, one after the other."""
    logits = jnp.concatenate([read.logits for read in reads])[source]
    return Read(_like_logits(logits), _rows_of([read.left for read in reads], source))


@functools.partial(jax.jit, donate_argnames="kept")
def keep(kept: Read, read: Read, source: jax.Array, target: jax.Array) -> Read:
    """Copies in each part of the rows one into one of those that are kept: int32 numbers among those of the part; a
    target that is no row's is for nothing.
    """

    def local(source: jax.Array, target: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        (logits, length, s), (own_logits, own_length, own_s) = arrays[:3], arrays[3:]
        return (
            own_logits.at[target].set(logits[source], mode="drop"),
            own_length.at[target].set(length[source], mode="drop"),
            own_s.at[:, target].set(s[:, source], mode="drop"),
        )

    axes = (("batch", "vocab"), _LENGTH, _S)
    named = {f"{what} {i}": names for what in ("read", "kept") for i, names in enumerate(axes)}
    arrays = (a for one in (read, kept) for a in (one.logits, one.left.length, one.left.lightning.s))
    with on_mesh_of(kept.left.length):
        run = on_mesh(local, None, axes, source=_LENGTH, target=_LENGTH, **named)
        logits, length, s = run(source, target, *arrays)
    return Read(logits, Left(LightningState(s), length))


@functools.partial(jax.jit, donate_argnames="read", static_argnames="logprobs")
def begin(
    read: Read, seen: jax.Array, sampling: SamplingRows, forced: jax.Array, allowed: jax.Array | None, logprobs: bool
) -> tuple[Chosen, Rows]:
    """A batch that continues prompts, and the first token of each row; the rest as in `decode`."""
    token = jnp.zeros(read.logits.shape[:1], jnp.int32)
    return _choose(read.logits, Rows(read.left, token, seen, sampling), forced, allowed, logprobs)


@functools.partial(jax.jit, donate_argnames=("rows", "cache"), static_argnames="logprobs")
def decode(
    model: M1,
    rows: Rows,
    cache: KVCache,
    pages: jax.Array,
    active: jax.Array,
    forced: jax.Array,
    allowed: jax.Array | None,
    logprobs: bool,
) -> tuple[Chosen, Rows, KVCache]:
    """Feeds each active row's last token and chooses the next.

    Args:
      model: the model.
      rows: the batch.
      cache: keys and values of all texts.
      pages: int32 `[B, n]`, where each row's are; with room for the token that is fed.
      active: bool `[B]`; what other rows have left stays as it is.
      forced: int32 `[B]`, the token to take instead of a sampled one, or `FREE`.
      allowed: None, or int32 `[B, ceil(V / 32)]`, a bit for each token that may be sampled, the lowest first.
      logprobs: whether to tell probabilities.

    Returns:
      What was chosen, the batch, and the keys and values.
    """
    logits, left, cache = _step(model, rows.token[:, None], active.astype(jnp.int32), rows.left, cache, pages)
    return *_choose(logits, dataclasses.replace(rows, left=left), forced, allowed, logprobs), cache


def _choose(
    logits: jax.Array, rows: Rows, forced: jax.Array, allowed: jax.Array | None, logprobs: bool
) -> tuple[Chosen, Rows]:
    token = sample(logits if allowed is None else only(logits, allowed), rows.sampling, rows.left.length, rows.seen)
    token = jnp.where(forced == FREE, token, forced)
    seen = rows.seen.at[jnp.arange(token.shape[0]), token].set(True)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    chosen, rows = Chosen(jnp.where(finite, token, NOT_A_NUMBER)), dataclasses.replace(rows, token=token, seen=seen)
    if logprobs:
        logp = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        most, best = lax.top_k(logp, min(ALTERNATIVES, logp.shape[-1]))
        chosen = dataclasses.replace(chosen, logprob=own, best=best, best_logprob=most)
    return jax.tree.map(everywhere, chosen), rows


@jax.jit
def join(batches: tuple[Rows, ...], source: jax.Array) -> Rows:
    """A batch of the given rows int32 `[B]` of all batches one after the other, each from among its devices' own."""

    def joined(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays)[source]

    rest = [jax.tree.map(joined, *parts) for parts in zip(*map(_parts, batches), strict=True)]
    return Rows(_rows_of([rows.left for rows in batches], source), *rest)


def _parts(rows: Rows) -> tuple[jax.Array, jax.Array, SamplingRows]:
    return rows.token, rows.seen, rows.sampling


def _rows_of(lefts: Sequence[Left], source: jax.Array) -> Left:
    """As `join`. One layer at a time: beside what goes in and what comes out there is little else."""
    n = len(lefts)

    def local(source: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        lengths, states = arrays[:n], arrays[n:]
        sizes = [length.shape[0] for length in lengths]
        split = ways("batch")
        at = source
        for here, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
            there = here * split  # where this batch begins among the rows of all devices
            inside = (source >= there) & (source < there + size * split)
            at = jnp.where(inside, here + (source - there) % size, at)
        length = jnp.concatenate(lengths)[at]
        return length, lax.map(lambda layer: jnp.concatenate(layer)[at], states)

    named = {f"length {i}": _LENGTH for i in range(n)} | {f"state {i}": _S for i in range(n)}
    with on_mesh_of(lefts[0].length):
        run = on_mesh(local, None, (_LENGTH, _S), source=_LENGTH, **named)
        length, s = run(source, *(left.length for left in lefts), *(left.lightning.s for left in lefts))
    return Left(LightningState(s), length)


def _like_logits(logits: jax.Array) -> jax.Array:
    return laid_out(logits, "logits", ("batch", "vocab"))


@functools.partial(jax.jit, donate_argnames="cache")
def copy_pages(cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """Copies pages, in each part of the rows as many: int32 numbers; a target that is no page's is for nothing."""

    def local(k: jax.Array, v: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (x.at[:, target].set(x[:, source], mode="drop") for x in (k, v))
        return k, v

    run = on_mesh(local, None, (_CACHE, _CACHE), k=_CACHE, v=_CACHE, source=_LENGTH, target=_LENGTH)
    return KVCache(*run(cache.k, cache.v, source, target))


@functools.partial(jax.jit, static_argnames=("pages", "page"))
def grow(cache: KVCache, pages: int, page: int) -> KVCache:
    """The same keys and values with so many pages in each part of the rows, with room for so many tokens each."""

    def more(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (jnp.pad(x, ((0, 0), (0, pages - x.shape[1]), *((0, 0),) * 3)) for x in (k, v))
        return k, v

    def longer(x: jax.Array) -> jax.Array:
        return laid_out(jnp.pad(x, (*((0, 0),) * 3, (0, page - x.shape[3]), (0, 0))), "cache", _CACHE)

    return KVCache(*on_mesh(more, None, (_CACHE, _CACHE), k=_CACHE, v=_CACHE)(longer(cache.k), longer(cache.v)))


@functools.partial(jax.jit, static_argnames=("pages", "page"))
def empty_cache(model: M1, pages: int, page: int) -> KVCache:
    """A pool in which nothing was written."""
    return empty_state(model.config, model.dtype, pages, pages, page).cache


@functools.partial(jax.jit, static_argnames="B")
def empty(model: M1, B: int) -> Read:
    """Rows before the first token, where a step leaves its own: else it would compile again."""
    logits = _like_logits(jnp.zeros((B, model.config.vocab_size), jnp.float32))
    state = empty_state(model.config, model.dtype, B, B, ways("cache"))
    return Read(logits, Left(state.lightning, state.length))
