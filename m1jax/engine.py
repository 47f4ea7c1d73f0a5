"""Text generation: prefill in shape buckets, one compiled decode step, many texts at once.

Every array shape is rounded up to a power of two (rows, prompt chunk, cache length), so that a handful of compiled
functions serves all requests. Rows are independent of each other: what a row generates does not depend on its batch.
The host reads tokens one step behind the device, and in time where it decides a token itself (thinking budgets).

Letters: B batch rows (a bucket), T tokens of a chunk (a bucket), N cache length (a bucket), V vocabulary.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from m1jax import rows as device
from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.model import M1
from m1jax.reply import Reply, Request, Segment
from m1jax.rows import Rows
from m1jax.sampling import Sampling, SamplingRows
from m1jax.sharding.mesh import mesh_of
from m1jax.sharding.region import on_mesh_of
from m1jax.sharding.rules import shards
from m1jax.state import M1State
from m1jax.tokenizer import Tokenizer

CHUNK = 2048  # the most tokens of one prompt read at once
CHUNK_OF_ALL = 8192  # the same for all prompts of a batch together
SMALLEST_CHUNK = 16
SMALLEST_CACHE = 256
ROOM = 1024  # generated tokens that a new cache has room for; it doubles when they are used up
TRACED = 2048  # tokens looked at to find the layer where NaN begins


class Event(NamedTuple):
    """News of one text: the index of its request, the reply so far, and what is new in it.

    The last event of a text is the one whose reply has a `finish`.
    """

    request: int
    reply: Reply
    segments: list[Segment]


@dataclasses.dataclass
class Stats:
    """Counts and seconds; what compiling took is in `compile_seconds` only."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    decoded_tokens: int = 0  # the generated ones but for each text's first, which the prefill gives
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0


class Engine:
    """Generates texts with a model, on the mesh that its parameters lie on if they do.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      cancelled: asked before every step and chunk of a prompt; once true, all texts end as "interrupted".
      context: the most tokens of a prompt and its reply, for which every cache has room from the start, so that there
        are fewer shapes. None is the model's; caches then grow.

    Raises:
      UserError: the tokenizer has tokens that the model does not know, or the model's context is shorter.
    """

    def __init__(
        self,
        model: M1,
        tokenizer: Tokenizer,
        cancelled: Callable[[], bool] = lambda: False,
        context: int | None = None,
    ) -> None:
        config = model.config
        if context is not None and not 1 < context <= config.max_position_embeddings:
            raise UserError(f"context must be from 2 to the model's {config.max_position_embeddings}, not {context}")
        if tokenizer.size > config.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer.folder} has {tokenizer.size} tokens, the model {config.vocab_size}: "
                "use the tokenizer that came with the model"
            )
        unknown = [token for token in tokenizer.eos_ids if token >= config.vocab_size]
        if unknown:
            raise UserError(
                f"{tokenizer.folder} names token {unknown[0]} as one that ends a text, the model has "
                f"{config.vocab_size}: correct eos_token_id in generation_config.json"
            )
        self.model, self.tokenizer, self.cancelled = model, tokenizer, cancelled
        self.context = config.max_position_embeddings if context is None else context
        self._smallest_cache = SMALLEST_CACHE if context is None else context
        self.eos_ids = end_tokens(config, tokenizer)
        self.stats = Stats()
        mesh = mesh_of(model.embed.get_value())
        self._rows = 1 if mesh is None else shards(mesh, "batch")
        self._compiled: dict[Hashable, Any] = {}

    def generate(
        self,
        requests: Sequence[Request],
        max_rows: int = 8,
        prior: M1State | None = None,
        done: Collection[tuple[int, int]] = (),
        eager: bool = False,
    ) -> "Generation":
        """Starts generating; iterate over the result for the events.

        Args:
          requests: what to generate.
          max_rows: the most texts generated at once; others take the place of those that end.
          prior: with a single request for a single text, a state (one row) that has read the prompt's beginning.
            It is used up.
          done: (index of request, sample) of texts to leave out.
          eager: begin a text as soon as there is a place, not when a quarter of the rows is free: whoever waits for one
            waits less, all together take longer.

        Raises:
          UserError: a prompt does not fit into the model's context.
          ValueError: `max_rows` is less than 1.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected 1 or more, got {max_rows}")
        for request in requests:
            check_context(len(request.tokens), self.context)
        texts = ((i, request, k) for i, request in enumerate(requests) for k in range(request.n))
        queue = (self.slot(i, request, k) for i, request, k in texts if (i, k) not in done)
        return Generation(self, queue, max_rows, prior, 1 if eager else max(1, max_rows // 4))

    def slot(self, index: int, request: Request, sample: int) -> "_Slot":
        """A text that has not begun, of the request of this index."""
        return _Slot(index, Reply(request, sample, self.tokenizer, self.eos_ids, self.context))

    def run(self, function: Any, *args: Any, **static: int) -> Any:
        """Calls a jitted function of `m1jax.rows`, compiling it (once per shape) outside the measured time."""
        leaves = [x for arg in args if not isinstance(arg, M1) for x in jax.tree.leaves(arg)]
        shapes = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (function.__name__, shapes, *static.items())
        if key not in self._compiled:
            start = time.perf_counter()
            with on_mesh_of(self.model.embed.get_value()):
                self._compiled[key] = function.lower(*args, **static).compile()
            self.stats.compile_seconds += time.perf_counter() - start
            self.stats.compilations += 1
        return self._compiled[key](*args)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time inside to a field of `stats`, compiling excepted."""
        start, compiling = time.perf_counter(), self.stats.compile_seconds
        try:
            yield
        finally:
            spent = time.perf_counter() - start - (self.stats.compile_seconds - compiling)
            setattr(self.stats, name, getattr(self.stats, name) + spent)

    def bucket(self, n: int, smallest: int = 1) -> int:
        """The power of two at or above n."""
        return max(smallest, 1 << (n - 1).bit_length())

    def rows_bucket(self, n: int) -> int:
        """The number of rows of a batch for n texts: a mesh may split it."""
        return self._rows * self.bucket(-(-n // self._rows))

    def cache_bucket(self, n: int) -> int:
        """The length of a cache for n tokens."""
        return min(self.bucket(n, self._smallest_cache), self.context)

    def prefill(
        self, prompts: Sequence[Sequence[int]], N: int, prior: M1State | None = None
    ) -> tuple[jax.Array, M1State]:
        """Reads prompts, chunk by chunk.

        Args:
          prompts: of each row, the tokens that `prior` has not read.
          N: cache length.
          prior: a state to go on from, used up; its cache may be longer.

        Returns:
          Logits `[B, V]` after each prompt's last token, and the state; B is the bucket of the number of prompts.

        Raises:
          Cancelled: it was, between two chunks.
        """
        B = self.rows_bucket(len(prompts))
        logits, state = self.run(device.empty, self.model, B=B, N=N)
        if prior is not None:
            state = prior if prior.max_length >= N else self.run(device.grow, prior, N=N)
        longest = max(map(len, prompts))
        chunk = min(CHUNK, max(SMALLEST_CHUNK, CHUNK_OF_ALL // B))
        for start in range(0, longest, chunk):
            if start:
                logits.block_until_ready()  # a long prompt can be given up between two chunks
                if self.cancelled():
                    raise Cancelled
            T = self.bucket(min(chunk, longest - start), SMALLEST_CHUNK)
            tokens, lengths = np.zeros((B, T), np.int32), np.zeros((B,), np.int32)
            for b, prompt in enumerate(prompts):
                part = prompt[start : start + chunk]
                tokens[b, : len(part)], lengths[b] = part, len(part)
            logits, state = self.run(device.prefill, self.model, tokens, lengths, state, logits)
            self.stats.prompt_tokens += int(lengths.sum())
        return logits, state


def not_finite(model: M1, tokens: Sequence[int]) -> UserError:
    """The error for logits that are NaN after these tokens."""
    mesh = mesh_of(model.embed.get_value())
    rows = 1 if mesh is None else shards(mesh, "batch")
    place = model.first_bad_layer(np.tile(np.asarray(tokens[-TRACED:], np.int32), (rows, 1)))
    return UserError(
        f"the model computes NaN or infinity, first in {place or 'the state left by earlier tokens'}: its weights are "
        "damaged or overflow this dtype"
    )


def end_tokens(config: M1Config, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and the model's."""
    eos = config.eos_token_id
    return tokenizer.eos_ids | frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)


def check_context(prompt: int, context: int) -> None:
    """Raises `UserError` if a prompt of so many tokens leaves no room for an answer."""
    if prompt >= context:
        raise UserError(f"the prompt has {prompt} tokens, the model's context is {context}: shorten the prompt")


class Cancelled(Exception):
    """Reading prompts was given up."""


class _Slot(NamedTuple):
    """A text and the index of its request."""

    request: int
    reply: Reply


class _Read(NamedTuple):
    """A prompt that was read, of which samples are still to come: logits `[B, V]` and state, all rows the same."""

    request: int
    logits: jax.Array
    state: M1State


class _Pending(NamedTuple):
    """Tokens int32 `[B]` that the device has chosen and the host has not read, and the rows they matter for."""

    tokens: jax.Array
    active: list[int]


class Generation:
    """Texts in the making: iterate over it for `Event`s.

    When an iteration has ended, or between two events, more can be added; then iterate (on).

    Attributes:
      state: after the iteration, what the last batch's rows have read; its `length` says how many tokens of prompt and
        reply that is.
    """

    def __init__(
        self, engine: Engine, queue: Iterable[_Slot], max_rows: int, prior: M1State | None, fewest: int
    ) -> None:
        self._engine, self._max_rows, self._prior = engine, max_rows, prior
        self._fewest = fewest  # free rows for which it is worth joining
        self._later = iter(queue)  # not made before they are due
        self._queue = collections.deque(itertools.islice(self._later, max_rows))
        self._slots: list[_Slot] = []  # of the first rows; the others are padding
        self._chosen: list[int] = []  # how many tokens were chosen for each slot, those in flight included
        self._rows: Rows | None = None
        self._pending: _Pending | None = None
        self._half_started: _Read | None = None

    @property
    def state(self) -> M1State | None:
        """See the class."""
        return None if self._rows is None else self._rows.state

    def __iter__(self) -> Iterator[Event]:
        while self._queue or self._live():
            if self._engine.cancelled():
                yield from self._interrupt()
            elif self._wants_admission():
                yield from self._collect()
                yield from self._admit()
            elif not self._queue and self._engine.rows_bucket(len(self._live())) < self._size:
                yield from self._collect()
                self._compact()
            else:
                yield from self._step()

    def add(self, index: int, request: Request) -> None:
        """One more request, whose events bear `index`. Raises `UserError` if it does not fit into the context."""
        check_context(len(request.tokens), self._engine.context)
        self._queue.extend(self._engine.slot(index, request, k) for k in range(request.n))

    def drop(self, index: int) -> None:
        """Ends all texts of a request, of which there are no more events; another may take their places."""
        self._queue = collections.deque(slot for slot in self._queue if slot.request != index)
        for slot in self._slots:
            if slot.request == index and slot.reply.finish is None:
                slot.reply.end("interrupted")
        if self._half_started is not None and self._half_started.request == index:
            self._half_started = None

    @property
    def _size(self) -> int:
        """B of the current batch."""
        return 0 if self._rows is None else self._rows.token.shape[0]

    def _live(self) -> list[int]:
        return [b for b, slot in enumerate(self._slots) if slot.reply.finish is None]

    def _wants_admission(self) -> bool:
        """Joining costs a copy of the batch, so that a place is not always filled at once."""
        free = self._max_rows - len(self._live())
        return bool(self._queue) and (free == self._max_rows or free >= self._fewest)

    def _interrupt(self) -> Iterator[Event]:
        waiting = [*(self._slots[b] for b in self._live()), *self._queue]
        self._queue.clear()
        self._half_started = None
        for slot in itertools.chain(waiting, self._later):
            yield Event(slot.request, slot.reply, slot.reply.end("interrupted"))

    def _admit(self) -> Iterator[Event]:
        """Prefills waiting requests and adds them to the batch; the samples of one request share its prefill."""
        engine, live = self._engine, self._live()
        new = [self._queue.popleft() for _ in range(min(self._max_rows - len(live), len(self._queue)))]
        self._queue.extend(itertools.islice(self._later, len(new)))
        with engine.clock("prompt_seconds"):
            needed = max(len(slot.reply.request.tokens) + min(slot.reply.limit, ROOM) for slot in new)
            N = max(engine.cache_bucket(needed), self._rows.state.max_length if self._rows and live else 0)
            try:
                tokens, rows = self._begin(new, N)
            except Cancelled:
                self._prior = None
                self._queue.extendleft(reversed(new))  # they end with all others
                return
            self._rows = self._join(rows, live, len(new)) if live else rows
            self._slots = [*(self._slots[b] for b in live), *new]
            self._chosen = [*(self._chosen[b] for b in live), *[1] * len(new)]
            values = np.asarray(tokens).tolist()
        for slot, token in zip(new, values, strict=False):
            yield self._push(slot, token)

    def _begin(self, new: list[_Slot], N: int) -> tuple[jax.Array, Rows]:
        """The new texts as a batch of their own, with their first tokens."""
        engine = self._engine
        B = engine.rows_bucket(len(new))
        logits, state = self._prompts(new, N)
        seen = np.zeros((B, engine.model.config.vocab_size), bool)
        settings = [(Sampling(temperature=0), 0, 0)] * B
        for b, slot in enumerate(new):
            request = slot.reply.request
            seen[b, list(request.tokens)] = True
            settings[b] = (request.sampling, request.seed, slot.reply.sample)
        forced = _forced(B, {b: slot.reply for b, slot in enumerate(new)})
        return engine.run(device.begin, logits, state, seen, SamplingRows.of(settings), forced)

    def _prompts(self, new: list[_Slot], N: int) -> tuple[jax.Array, M1State]:
        """Logits and state after each new text's prompt, which is read unless an earlier sample's was kept."""
        engine, kept = self._engine, self._half_started
        unread = {slot.request: slot.reply.request.tokens for slot in new}
        place: dict[int, int] = {}  # which row of all reads each request is
        reads: list[tuple[jax.Array, M1State]] = []
        if kept is not None:
            del unread[kept.request]
            place[kept.request] = 0
            reads.append((kept.logits, kept.state))
        if unread:
            place |= {request: b for b, request in enumerate(unread, 0 if kept is None else engine.rows_bucket(1))}
            known = 0 if self._prior is None else int(self._prior.length[0])
            reads.append(engine.prefill([tokens[known:] for tokens in unread.values()], N, self._prior))
            self._prior = None
        last = new[-1].request
        if not self._queue or self._queue[0].request != last:
            self._half_started = None
        elif last in unread:
            room = engine.cache_bucket(len(unread[last]))
            row = _padded([place[last]], engine.rows_bucket(1))
            self._half_started = _Read(last, *engine.run(device.pick, tuple(reads), row, N=room))
        if len(new) == len(unread):
            return reads[0]
        source = _padded([place[slot.request] for slot in new], engine.rows_bucket(len(new)))
        return engine.run(device.pick, tuple(reads), source, N=N)

    def _join(self, new: Rows, live: list[int], count: int) -> Rows:
        """The live rows, then the first `count` rows of a new batch, whose cache is as long or longer."""
        assert self._rows is not None
        old = self._grown(new.state.max_length)
        source = _padded([*live, *range(self._size, self._size + count)], self._engine.rows_bucket(len(live) + count))
        return self._engine.run(device.join, (old, new), source)

    def _compact(self) -> None:
        """Drops the rows of texts that have ended."""
        live = self._live()
        if live:
            with self._engine.clock("decode_seconds"):
                source = _padded(live, self._engine.rows_bucket(len(live)))
                self._rows = self._engine.run(device.join, (self._rows,), source)
        self._slots = [self._slots[b] for b in live]
        self._chosen = [self._chosen[b] for b in live]

    def _grown(self, N: int) -> Rows:
        assert self._rows is not None
        if self._rows.state.max_length == N:
            return self._rows
        return dataclasses.replace(self._rows, state=self._engine.run(device.grow, self._rows.state, N=N))

    def _step(self) -> Iterator[Event]:
        """Starts the next step, then reads the tokens of the one before."""
        if any(self._slots[b].reply.must_be_current for b in self._live()):
            yield from self._collect()
        before = self._pending
        with self._engine.clock("decode_seconds"):
            self._pending = self._dispatch()
        yield from self._read(before)

    def _dispatch(self) -> _Pending | None:
        """Starts a step for the texts that can still grow; None if there are none."""
        going = [b for b in self._live() if self._chosen[b] < self._slots[b].reply.limit]
        if not going:
            return None
        needed = max(len(self._slots[b].reply.request.tokens) + self._chosen[b] for b in going)
        assert self._rows is not None
        self._rows = self._grown(max(self._rows.state.max_length, self._engine.cache_bucket(needed)))
        active = np.isin(np.arange(self._size), going)
        forced = _forced(self._size, {b: self._slots[b].reply for b in going})
        tokens, self._rows = self._engine.run(device.decode, self._engine.model, self._rows, active, forced)
        tokens.copy_to_host_async()
        for b in going:
            self._chosen[b] += 1
        return _Pending(tokens, going)

    def _collect(self) -> Iterator[Event]:
        """Reads what is in flight."""
        before, self._pending = self._pending, None
        yield from self._read(before)

    def _read(self, pending: _Pending | None) -> Iterator[Event]:
        if pending is None:
            return
        with self._engine.clock("decode_seconds"):
            tokens = np.asarray(pending.tokens).tolist()
        # A text that ended while its next token was in flight has no use for that token.
        for slot, token in [(self._slots[b], tokens[b]) for b in pending.active]:
            if slot.reply.finish is None:
                self._engine.stats.decoded_tokens += 1
                yield self._push(slot, token)

    def _push(self, slot: _Slot, token: int) -> Event:
        reply = slot.reply
        if token == device.NOT_A_NUMBER:
            raise not_finite(self._engine.model, [*reply.request.tokens, *reply.tokens])
        self._engine.stats.generated_tokens += 1
        return Event(slot.request, reply, reply.push(token))


def _forced(B: int, replies: Mapping[int, Reply]) -> np.ndarray:
    """The tokens that rows must take, int32 `[B]`."""
    forced = np.full((B,), device.FREE, np.int32)
    for b, reply in replies.items():
        token = reply.take_forced()
        if token is not None:
            forced[b] = token
    return forced


def _padded(source: list[int], B: int) -> np.ndarray:
    """Row indices int32 `[B]`, the first one repeated at the end."""
    return np.asarray(source + source[:1] * (B - len(source)), np.int32)
