"""Texts in the making: which are generated, which wait, and the steps of all that are.

Letters as in `engine.py`.
"""

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from m1jax import rows as device
from m1jax.errors import UserError
from m1jax.model import M1
from m1jax.reply import Reply, Request, Segment, check_context
from m1jax.rows import Rows
from m1jax.sampling import Sampling, SamplingRows
from m1jax.sharding.mesh import mesh_of
from m1jax.sharding.rules import shards
from m1jax.state import M1State

if TYPE_CHECKING:
    from m1jax.engine import Engine

ROOM = 1024  # generated tokens that a new cache has room for; it doubles when they are used up
TRACED = 2048  # tokens looked at to find the layer where NaN begins


class Event(NamedTuple):
    """News of one text: the index of its request, the reply so far, and what is new in it.

    The last event of a text is the one whose reply has a `finish`.
    """

    request: int
    reply: Reply
    segments: list[Segment]


def not_finite(model: M1, tokens: Sequence[int]) -> UserError:
    """The error for logits that are NaN after these tokens."""
    mesh = mesh_of(model.embed.get_value())
    rows = 1 if mesh is None else shards(mesh, "batch")
    place = model.first_bad_layer(np.tile(np.asarray(tokens[-TRACED:], np.int32), (rows, 1)))
    return UserError(
        f"the model computes NaN or infinity, first in {place or 'the state left by earlier tokens'}: its weights are "
        "damaged or overflow this dtype"
    )


class Cancelled(Exception):
    """Reading prompts was given up."""


class _Unwanted(Exception):
    """Nobody wants the prompts any more that are being read."""


class Slot(NamedTuple):
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
        self, engine: "Engine", queue: Iterable[Slot], max_rows: int, prior: M1State | None, eager: bool
    ) -> None:
        self._engine, self._max_rows, self._prior, self._eager = engine, max_rows, prior, eager
        self._later = iter(queue)  # not made before they are due
        self._queue = collections.deque(itertools.islice(self._later, max_rows))
        self._slots: list[Slot] = []  # of the first rows; the others are padding
        self._chosen: list[int] = []  # how many tokens were chosen for each slot, those in flight included
        self._rows: Rows | None = None
        self._pending: _Pending | None = None
        self._half_started: _Read | None = None
        self._entering: list[Slot] = []  # whose prompts are being read

    @property
    def state(self) -> M1State | None:
        """See the class."""
        return None if self._rows is None else self._rows.state

    def __iter__(self) -> Iterator[Event]:
        while self._queue or self._live():
            if self._engine.cancelled():
                yield from self._interrupt()
            elif self._wants_admission():
                others = bool(self._live())
                yield from self._collect()
                yield from self._admit()
                if self._eager and others and self._live():  # or those that join would hold them up for good
                    yield from self._step()
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
        """Ends all texts of a request that has begun or was added; there are no more events of it."""
        kept = collections.deque(slot for slot in self._queue if slot.request != index)
        kept.extend(itertools.islice(self._later, len(self._queue) - len(kept)))
        self._queue = kept
        for slot in [*self._slots, *self._entering]:
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
        """Joining costs a copy of the batch: unless it is to be eager, a quarter of the rows joins at a time."""
        free = self._max_rows - len(self._live())
        fewest = 1 if self._eager else max(1, self._max_rows // 4)
        return bool(self._queue) and (free == self._max_rows or free >= fewest)

    def _interrupt(self) -> Iterator[Event]:
        waiting = [*(self._slots[b] for b in self._live()), *self._queue]
        self._queue.clear()
        self._half_started = None
        for slot in itertools.chain(waiting, self._later):
            if slot.reply.finish is not None:  # dropped meanwhile
                continue
            yield Event(slot.request, slot.reply, slot.reply.end("interrupted"))

    def _admit(self) -> Iterator[Event]:
        """Prefills waiting requests and adds them to the batch; the samples of one request share its prefill."""
        engine, live = self._engine, self._live()
        new: list[Slot] = []
        while self._queue and len(new) < self._max_rows - len(live):
            if self._eager and new and self._queue[0].request != new[0].request:
                break
            new.append(self._queue.popleft())
        if not new:  # all were dropped when it was their turn
            return
        self._queue.extend(itertools.islice(self._later, len(new)))
        needed = max(len(slot.reply.request.tokens) + min(slot.reply.limit, ROOM) for slot in new)
        N = max(engine.cache_bucket(needed), self._rows.state.max_length if self._rows and live else 0)
        self._entering = new
        try:
            logits, state = yield from self._prompts(new, N)
        except (Cancelled, _Unwanted) as end:
            self._prior = None
            if isinstance(end, Cancelled):
                wanted = [slot for slot in new if slot.reply.finish is None]
                self._queue.extendleft(reversed(wanted))  # they end with all others
            return
        finally:
            self._entering = []
        with engine.clock("prompt_seconds"):
            tokens, rows = self._begin(new, logits, state)
            live = self._live()
            self._rows = self._join(rows, live, len(new)) if live else rows
            self._slots = [*(self._slots[b] for b in live), *new]
            self._chosen = [*(self._chosen[b] for b in live), *[1] * len(new)]
            values = np.asarray(tokens).tolist()
        for slot, token in zip(new, values, strict=False):
            if slot.reply.finish is None:
                yield self._push(slot, token)

    def _begin(self, new: list[Slot], logits: jax.Array, state: M1State) -> tuple[jax.Array, Rows]:
        """The new texts as a batch of their own, with their first tokens."""
        engine = self._engine
        B = engine.rows_bucket(len(new))
        seen = np.zeros((B, engine.model.config.vocab_size), bool)
        settings = [(Sampling(temperature=0), 0, 0)] * B
        for b, slot in enumerate(new):
            request = slot.reply.request
            seen[b, list(request.tokens)] = True
            settings[b] = (request.sampling, request.seed, slot.reply.sample)
        forced = _forced(B, {b: slot.reply for b, slot in enumerate(new)})
        return engine.run(device.begin, logits, state, seen, SamplingRows.of(settings), forced)

    def _between_steps(
        self, reading: Generator[None, None, tuple[jax.Array, M1State]]
    ) -> Generator[Event, None, tuple[jax.Array, M1State]]:
        """What is read, with a step of the texts that are generated between two chunks."""
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value
            if self._live():
                yield from self._step()
                yield from self._collect()  # its time is not the prompt's, and who hears of it may drop what joins
            if all(slot.reply.finish is not None for slot in self._entering):
                raise _Unwanted

    def _prompts(self, new: list[Slot], N: int) -> Generator[Event, None, tuple[jax.Array, M1State]]:
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
            reading = engine.read([tokens[known:] for tokens in unread.values()], N, self._prior)
            reads.append((yield from self._between_steps(reading)))
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
        """The live rows, then the first `count` rows of a new batch."""
        assert self._rows is not None
        N = max(self._rows.state.max_length, new.state.max_length)
        source = _padded([*live, *range(self._size, self._size + count)], self._engine.rows_bucket(len(live) + count))
        return self._engine.run(device.join, (self._grown(self._rows, N), self._grown(new, N)), source)

    def _compact(self) -> None:
        """Drops the rows of texts that have ended."""
        live = self._live()
        if live:
            with self._engine.clock("decode_seconds"):
                source = _padded(live, self._engine.rows_bucket(len(live)))
                self._rows = self._engine.run(device.join, (self._rows,), source)
        self._slots = [self._slots[b] for b in live]
        self._chosen = [self._chosen[b] for b in live]

    def _grown(self, rows: Rows, N: int) -> Rows:
        if rows.state.max_length == N:
            return rows
        return dataclasses.replace(rows, state=self._engine.run(device.grow, rows.state, N=N))

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
        N = max(self._rows.state.max_length, self._engine.cache_bucket(needed))
        self._rows = self._grown(self._rows, N)
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

    def _push(self, slot: Slot, token: int) -> Event:
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
