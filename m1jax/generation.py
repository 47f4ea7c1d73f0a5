"""Texts in the making: which are generated, which wait, and the steps of all that are.

Where a mesh splits rows a text stays on the devices that it begins on: in one of as many parts of the batch. Where the
pool of pages has a limit and no page is left, the youngest text of that part gives its own up; what there is of it is
read again, like a prompt, when there is room.

Letters as in `engine.py`.
"""

import collections
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from m1jax import rows as device
from m1jax.errors import UserError
from m1jax.model import M1
from m1jax.pool import Pool
from m1jax.prefixes import Prefix, Prefixes
from m1jax.reply import Reply, Request, Segment, TokenLogprob, check_context
from m1jax.rows import Chosen, Left, Read, Rows
from m1jax.sampling import Sampling, SamplingRows
from m1jax.sharding.mesh import mesh_of
from m1jax.sharding.rules import shards
from m1jax.slots import Prompt, Slot, allowed_tokens, forced_tokens, laid_out, told, wants_logprobs

if TYPE_CHECKING:
    from m1jax.engine import Engine

TRACED = 2048  # tokens looked at to find the layer where NaN begins
WORTH = 8  # pages of tokens that another part need not read, for which a text goes there though more texts are there


class Event(NamedTuple):
    """News of one text: the index of its request, the reply so far, and what is new in it.

    The last event of a text is the one whose reply has a `finish`.
    """

    request: int
    reply: Reply
    segments: list[Segment]


def not_finite(model: M1, tokens: Sequence[int] | NDArray[np.int32]) -> UserError:
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
    """Nobody wants the prompts any more that are being read, or their pages were needed."""


class Kept(NamedTuple):
    """A prompt that was read, of which samples are still to come, by part of the batch; `read` has a row for each."""

    prompts: dict[int, Prompt]
    read: Read


class Prior(NamedTuple):
    """What a text has left behind: its row, the pool, and its pages there."""

    left: Left
    pool: Pool
    pages: list[int]


class _Pending(NamedTuple):
    """What the device has chosen and the host has not read, and whose it is, by row."""

    chosen: Chosen
    slots: dict[int, Slot]


class Generation:
    """Texts in the making: iterate over it for `Event`s.

    When an iteration has ended, or between two events, more can be added; then iterate (on).
    """

    def __init__(
        self, engine: "Engine", queue: Iterable[Slot], max_rows: int, prior: Prior | None, eager: bool
    ) -> None:
        self._engine, self._max_rows, self._prior, self._eager = engine, max_rows, prior, eager
        self._pool = engine.pool(max_rows) if prior is None else prior.pool
        self._prefixes = Prefixes(engine, self._pool, engine.prefix_cache if eager and prior is None else 0)
        # Not made before they are due.
        self._later, self._all_made = (slot for slot in queue if slot.request not in self._dropped), False
        self._dropped = set[int]()  # requests of which more texts might be made
        self._queue = collections.deque[Slot]()
        self._make(max_rows)
        self._slots: list[Slot | None] = []  # of each row; None is padding
        self._width = 0  # of the table of their pages
        self._table: tuple[tuple[int, int], np.ndarray] | None = None  # the pool's changes, the width, the table then
        self._rows: Rows | None = None
        self._pending: _Pending | None = None
        self._kept: Kept | None = None
        self._entering: list[Slot] = []  # whose prompts are being read
        self._reading: list[Prompt] = []  # those of them that were not kept
        self._owed = [0] * engine.parts  # pages that they will have copies in
        self._turns = itertools.count()

    @property
    def left(self) -> Prior | None:
        """After the iteration over a single text, what it has left: a `prior`, and no longer this generation's."""
        if self._rows is None or not self._slots or self._slots[0] is None:
            return None
        self._prefixes.clear()
        return Prior(self._rows.left, self._pool, self._slots[0].pages)

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
            elif len(laid_out(self._engine.parts, self._live())) < len(self._slots):
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
        waiting = len(self._queue)
        self._queue = collections.deque(slot for slot in self._queue if slot.request != index)
        if not self._all_made:
            self._dropped.add(index)
            self._make(waiting - len(self._queue))
        for slot in [*self._live(), *self._entering]:
            if slot.request == index and slot.live:
                slot.reply.end("interrupted")
        kept = [] if self._kept is None else self._kept.prompts.values()
        if not any(prompt.request != index or prompt.slots for prompt in kept):
            self._forget()

    def rest(self) -> None:
        """After an iteration, gives back the memory of what it has left; a pool that does not grow stays."""
        self._release_ended()
        self._forget()
        self._slots, self._rows, self._table, self._pending = [], None, None, None
        if self._pool.limit is None:
            self._pool = self._engine.pool(self._max_rows)

    def _make(self, count: int) -> None:
        """Puts so many more texts into the queue, as far as there are any."""
        before = len(self._queue)
        self._queue.extend(itertools.islice(self._later, count))
        if len(self._queue) < before + count:
            self._all_made = True
            self._dropped.clear()

    def _live(self) -> list[Slot]:
        return [slot for slot in self._slots if slot is not None and slot.live]

    def _interrupt(self) -> Iterator[Event]:
        self._forget()
        for slot in self._live():
            if slot.live:  # or it was dropped meanwhile
                yield Event(slot.request, slot.reply, slot.reply.end("interrupted"))
        while self._queue:
            slot = self._queue.popleft()
            self._make(1)
            yield Event(slot.request, slot.reply, slot.reply.end("interrupted"))

    # --- where texts are -------------------------------------------------------------------------------------------

    def _place(self, slot: Slot, new: Sequence[Slot]) -> bool:
        """Puts a text in the part with the fewest texts of those that have room; False if none has."""
        texts, parts = [*self._live(), *new], self._engine.parts
        counts = [sum(one.part == part for one in texts) for part in range(parts)]
        found = [self._prefixes.longest(part, slot.tokens) if self._prefixes.limit else None for part in range(parts)]
        known = [0 if prefix is None else prefix.tokens.size for prefix in found]
        order = sorted(range(parts), key=lambda part: (counts[part], -known[part]))
        most = max(order, key=known.__getitem__)
        if known[most] >= known[order[0]] + WORTH * self._pool.page:
            order.sort(key=most.__ne__)
        for slot.part in order:
            if counts[slot.part] * parts < self._max_rows and self._fits(slot, new, found[slot.part]):
                return True
        slot.prefix = None
        return False

    def _fits(self, slot: Slot, new: Sequence[Slot], prefix: Prefix | None) -> bool:
        """Whether a text's part has the pages for it: best if what is known of it stays, else if it takes that."""
        others, ways = [one for one in new if one.prefix is prefix], list[tuple[Prefix | None, bool]]()
        if prefix is not None and not any(one.takes for one in others):
            ways = [(prefix, False)] if others else [(prefix, False), (prefix, True)]
        for slot.prefix, slot.takes in (*ways, (None, False)):
            spared = {one.prefix for one in (*new, slot)}
            if self._prefixes.make_room(slot.part, self._wanted([*new, slot], slot.part), spared):
                return True
        return False

    def _wanted(self, new: Sequence[Slot], part: int) -> int:
        """How many pages more the texts that begin in a part are to have room in."""
        kept = [] if self._kept is None else self._kept.prompts.values()
        shared, pages = {prompt.request for prompt in kept if prompt.part == part}, 0
        for slot in new:
            if slot.part != part:
                continue
            pages += self._pool.pages_for(slot.roomy)
            if not slot.begun and slot.request in shared:
                pages -= self._pool.full(len(slot.tokens))
            elif slot.prefix is not None:
                pages -= len(slot.prefix.pages) if slot.takes else self._pool.full(slot.prefix.tokens.size)
            shared |= set() if slot.begun else {slot.request}
        return pages if self._prior is None else pages - len(self._prior.pages)

    def _return(self, slots: list[Slot]) -> None:
        """Puts texts back to the head of the queue, those that have begun first, in the order that they began in."""
        while self._queue and self._queue[0].begun:
            slots.append(self._queue.popleft())
        slots.sort(key=lambda slot: (not slot.begun, slot.turn))
        self._queue.extendleft(reversed(slots))

    def _release_ended(self) -> None:
        """Takes the pages of texts that have ended."""
        for slot in self._slots:
            if slot is not None and not slot.live:
                self._pool.release(slot)

    def _forget(self) -> None:
        """Takes the pages of what was kept."""
        if self._kept is not None:
            for prompt in self._kept.prompts.values():
                self._pool.release(prompt)
        self._kept = None

    # --- texts that begin ------------------------------------------------------------------------------------------

    def _wants_admission(self) -> bool:
        """Joining costs a copy of the batch: unless it is to be eager, a quarter of the rows joins at a time."""
        live = self._live()
        free = self._max_rows - len(live)
        fewest = 1 if self._eager else max(1, self._max_rows // 4)
        if not self._queue or not live:
            return bool(self._queue)
        self._release_ended()
        return free >= fewest and self._place(self._queue[0], [])

    def _entrants(self) -> list[Slot]:
        """Takes from the queue, in its order, those for which there is room."""
        live, new = self._live(), list[Slot]()
        self._release_ended()
        while self._queue and len(new) < self._max_rows - len(live):
            slot = self._queue[0]
            if self._eager and new and slot.request != new[0].request:
                break
            if not self._place(slot, new):
                if live or new:
                    break
                self._forget()
                placed = self._place(slot, new)
                assert placed, "a part has room for the longest text"
            new.append(self._queue.popleft())
        self._make(len(new))
        return new

    def _admit(self) -> Iterator[Event]:
        """Reads waiting prompts and adds their texts to the batch; the samples of one request share their prompt."""
        engine, new = self._engine, self._entrants()
        if not new:  # all were dropped when it was their turn
            return
        prompts = self._prompts(new)
        self._entering = new
        try:
            read = yield from self._read(new)
        except (Cancelled, _Unwanted):
            self._return([slot for slot in new if slot.live])
            for prompt in prompts:
                prompt.slots.clear()
            return
        finally:
            self._entering, self._prior, self._owed = [], None, [0] * engine.parts
        with engine.clock("prompt_seconds"):
            self._remember(prompts, read)
            read = self._picked(new, prompts, read)
            self._reading = []
            live, layout = self._live(), laid_out(self._engine.parts, new)
            chosen, rows = self._begin(layout, read)
            self._release_ended()
            if live:
                self._join(live, layout, rows)
            else:
                self._slots, self._rows, self._width, self._table = layout, rows, 0, None
            self._width = max(self._width, self._pool.width(max(slot.roomy for slot in new)))
            values = dict(zip(layout, told(chosen), strict=True))
        for slot in new:
            if slot.live:
                yield self._push(slot, *values[slot])

    def _prompts(self, new: list[Slot]) -> list[Prompt]:
        """What the new texts begin with; what of it was not kept is in `_reading`, in pages of its own."""
        kept = {} if self._kept is None else {(p.request, p.part): p for p in self._kept.prompts.values()}
        wanted = [self._wanted(new, part) for part in range(self._engine.parts)]
        self._pool.prepare(max(slot.roomy for slot in new), wanted)
        prompts: dict[object, Prompt] = {}
        for slot in new:
            key = slot if slot.begun else (slot.request, slot.part)
            if key not in prompts:
                request = None if slot.begun else slot.request
                fresh = Prompt(request, slot.part, slot.tokens, prefix=slot.prefix, takes=slot.takes)
                prompts[key] = kept.get((fresh.request, fresh.part), fresh)
            prompts[key].slots.append(slot)
            slot.prefix = None
        self._reading = [prompt for prompt in prompts.values() if not prompt.pages]
        copies: list[list[tuple[int, int]]] = [[] for _ in range(self._engine.parts)]
        for prompt in self._reading:
            if self._prior is not None:
                prompt.known, prompt.pages = int(self._prior.left.length[0]), list(self._prior.pages)
            own = self._prefixes.begin(prompt)
            more = self._pool.take(prompt.part, self._pool.pages_for(len(prompt.tokens)) - len(prompt.pages))
            copies[prompt.part] += zip(own, more, strict=False)
            prompt.pages += more
        self._pool.copy(copies)
        self._owed = self._copies(prompts.values())
        return list(prompts.values())

    def _copies(self, prompts: Iterable[Prompt]) -> list[int]:
        """Of how many pages the texts that begin with prompts have copies, in each part, where none stays."""
        copies = [0] * self._engine.parts
        for prompt in prompts:
            copies[prompt.part] += (len(prompt.slots) - 1) * (len(prompt.pages) - self._pool.full(len(prompt.tokens)))
        return copies

    def _read(self, new: list[Slot]) -> Generator[Event, None, Read | None]:
        """What is to be read, laid out, with a step of the texts that are generated between two chunks."""
        if not self._reading:
            return None
        width = self._pool.width(max(slot.roomy for slot in new))
        rows, first = laid_out(self._engine.parts, self._reading), self._reading[0]
        alone = len(self._reading) == 1 and first.request is not None
        stop = self._prefixes.parting(first) if alone else None
        reading = self._engine.read(rows, self._pool, width, self._known(rows), stop)
        while True:
            try:
                until_stop = next(reading)
                if until_stop is not None:
                    assert stop is not None
                    self._prefixes.remember(first, until_stop, rows, stop, self._owed)
            except StopIteration as end:
                return end.value
            except Cancelled:
                self._release_read()
                raise
            if self._live():
                yield from self._step()
                yield from self._collect()  # its time is not the prompt's, and who hears of it may drop what joins
            if not self._reading or not any(slot.live for slot in new):
                self._release_read()
                raise _Unwanted

    def _known(self, rows: Sequence[Prompt | None]) -> Read:
        """What is known of the prompts in rows."""
        read = self._engine.run(device.empty, self._engine.model, B=len(rows))
        if self._prior is not None:
            return Read(read.logits, self._prior.left)
        return self._prefixes.read(read, rows)

    def _remember(self, prompts: Sequence[Prompt], read: Read | None) -> None:
        """Remembers those prompts that were read, not texts that go on."""
        rows, owed = laid_out(self._engine.parts, self._reading), self._copies(prompts)
        for prompt in self._reading:
            if read is not None and prompt.request is not None and prompt.known < len(prompt.tokens):
                self._prefixes.remember(prompt, read, rows, len(prompt.tokens), owed)

    def _release_read(self) -> None:
        """Gives up what is being read, and what was kept, of which texts may be waiting to begin."""
        for prompt in self._reading:
            self._pool.release(prompt)
        self._reading, self._owed = [], [0] * self._engine.parts
        self._forget()

    def _picked(self, new: list[Slot], prompts: list[Prompt], read: Read | None) -> Read:
        """A row for each new text, in its part; what later ones begin with is kept. All have their pages then."""
        engine, parts, kept = self._engine, self._engine.parts, self._kept
        before = {} if kept is None else kept.prompts
        rows = [*([] if kept is None else map(before.get, range(parts))), *laid_out(parts, self._reading)]
        place = {prompt: row for row, prompt in enumerate(rows) if prompt is not None}

        def picked(wanted: Iterable[Prompt | None]) -> Read:
            reads = tuple(one for one in (None if kept is None else kept.read, read) if one is not None)
            source = [0 if prompt is None else place[prompt] for prompt in wanted]
            return engine.run(device.pick, reads, np.asarray(source, np.int32))

        stays = self._staying(new[-1], prompts, place)
        for prompt in before.values():
            if not prompt.slots and prompt not in stays.values():
                self._pool.release(prompt)
        if not stays:
            self._kept = None
        elif kept is not None and all(before.get(part) is prompt for part, prompt in stays.items()):
            self._kept = Kept(stays, kept.read)
        else:
            self._kept = Kept(stays, picked(map(stays.get, range(parts))))
        begins = {slot: prompt for prompt in prompts for slot in prompt.slots}
        for slot, prompt in begins.items():
            if not slot.begun:
                slot.reply.cached_tokens = prompt.known
        self._give_pages(prompts, list(stays.values()))
        if read is not None and len(self._reading) == len(new):
            return read
        return picked(None if slot is None else begins[slot] for slot in laid_out(parts, new))

    def _staying(self, last: Slot, prompts: list[Prompt], read: Iterable[Prompt]) -> dict[int, Prompt]:
        """Of all prompts that were read the last text's, by part, if more samples of it are to come."""
        following = self._queue[0] if self._queue else last
        if following is last or following.request != last.request or following.begun or last.begun:
            return {}
        stays = {prompt.part: prompt for prompt in read if prompt.request == last.request}
        # What stays keeps its last page, of which each text then has a copy: not where there is no page for that.
        copies = self._copies(prompts)
        return {part: prompt for part, prompt in stays.items() if self._pool.has(part, copies[part] + 1)}

    def _give_pages(self, prompts: Sequence[Prompt], stays: Sequence[Prompt]) -> None:
        """To each text those of its prompt: the full ones are shared, of another each has its own."""
        copies: list[list[tuple[int, int]]] = [[] for _ in range(self._engine.parts)]
        for prompt in prompts:
            own = None if prompt in stays else prompt.slots[-1]
            full = self._pool.full(len(prompt.tokens))
            for slot in prompt.slots:
                if slot is own:
                    slot.pages, prompt.pages = prompt.pages, []
                    continue
                slot.pages = self._pool.share(prompt.part, prompt.pages[:full])
                for page in prompt.pages[full:]:
                    slot.pages += self._pool.take(prompt.part, 1)
                    copies[prompt.part].append((page, slot.pages[-1]))
            prompt.slots.clear()
        self._pool.copy(copies)

    def _begin(self, layout: Sequence[Slot | None], read: Read) -> tuple[Chosen, Rows]:
        """The new texts as a batch of their own, with their next tokens."""
        engine, B = self._engine, len(layout)
        seen = np.zeros((B, engine.model.config.vocab_size), bool)
        settings = [(Sampling(temperature=0), 0, 0)] * B
        for b, slot in enumerate(layout):
            if slot is not None:
                request = slot.reply.request
                seen[b, slot.tokens] = True
                settings[b] = (request.sampling, request.seed, slot.reply.sample)
                slot.chosen = len(slot.reply.tokens) + 1
                slot.turn = next(self._turns) if slot.turn < 0 else slot.turn
        sampling, logprobs = SamplingRows.of(settings), wants_logprobs(slot for slot in layout if slot is not None)
        return engine.run(
            device.begin, read, seen, sampling, forced_tokens(layout), allowed_tokens(layout), logprobs=logprobs
        )

    def _join(self, live: list[Slot], layout: Sequence[Slot | None], rows: Rows) -> None:
        """Puts the texts of a new batch beside those that live."""
        assert self._rows is not None
        old = [slot if slot in live else None for slot in self._slots]
        new = [slot for slot in layout if slot is not None]
        self._arrange([*live, *new], [*old, *layout], (self._rows, rows))

    def _arrange(self, slots: list[Slot], old: Sequence[Slot | None], batches: tuple[Rows, ...]) -> None:
        """Makes a batch of these texts; `old` are those of all rows of the given batches."""
        row = {slot: b for b, slot in enumerate(old) if slot is not None}
        self._slots, self._table = laid_out(self._engine.parts, slots), None
        source = [0 if slot is None else row[slot] for slot in self._slots]
        self._rows = self._engine.run(device.join, batches, np.asarray(source, np.int32))

    def _compact(self) -> None:
        """Drops the rows of texts that have ended."""
        live = self._live()
        if live:
            assert self._rows is not None
            with self._engine.clock("decode_seconds"):
                self._release_ended()
                self._arrange(live, self._slots, (self._rows,))

    # --- steps -----------------------------------------------------------------------------------------------------

    def _step(self) -> Iterator[Event]:
        """Starts the next step, then reads the tokens of the one before."""
        part = self._short()
        if part is not None or any(slot.reply.must_be_current for slot in self._live()):
            yield from self._collect()
            part = self._short()
        while part is not None:
            self._displace(part)
            part = self._short()
        before = self._pending
        with self._engine.clock("decode_seconds"):
            self._pending = self._dispatch()
        yield from self._take(before)

    def _going(self) -> list[Slot]:
        """The texts that can still grow."""
        return [slot for slot in self._live() if slot.chosen < slot.reply.limit]

    def _more(self) -> list[dict[Slot, int]]:
        """How many pages the texts of each part want for the next step."""
        more: list[dict[Slot, int]] = [{} for _ in range(self._engine.parts)]
        for slot in self._going():
            more[slot.part][slot] = max(0, self._pool.pages_for(slot.needed) - len(slot.pages))
        return more

    def _short(self) -> int | None:
        """A part that has too few pages for the next step; None if none has."""
        for part, more in enumerate(self._more()):
            pages = sum(more.values()) + self._owed[part]
            if not self._pool.has(part, pages):
                self._release_ended()
                if not self._prefixes.make_room(part, pages):
                    return part
        return None

    def _displace(self, part: int) -> None:
        """Takes a part's pages from what can be read again: what is read there or kept, else the youngest text."""
        kept = {} if self._kept is None else self._kept.prompts
        if any(prompt.part == part for prompt in self._reading) or (part in kept and kept[part].slots):
            self._release_read()
        elif part in kept:
            self._pool.release(kept.pop(part))
        else:
            youngest = max((slot for slot in self._live() if slot.part == part), key=lambda slot: slot.turn)
            self._slots[self._slots.index(youngest)] = None
            self._pool.release(youngest)
            self._return([youngest])

    def _dispatch(self) -> _Pending | None:
        """Starts a step for the texts that can still grow; None if there are none."""
        engine, pool, more = self._engine, self._pool, self._more()
        going = {slot: pages for part in more for slot, pages in part.items()}
        if not going:
            return None
        longest = max(slot.needed for slot in going)
        pool.prepare(longest, [sum(part.values()) for part in more])
        for slot, pages in going.items():
            slot.pages += pool.take(slot.part, pages)
        self._width = max(self._width, pool.width(longest))
        rows = [slot if slot in going else None for slot in self._slots]
        active = np.asarray([slot is not None for slot in rows])
        if self._table is None or self._table[0] != (pool.changes, self._width):
            self._table = (pool.changes, self._width), pool.table(self._slots, self._width)
        args = engine.model, self._rows, pool.cache, self._table[1], active, forced_tokens(rows), allowed_tokens(rows)
        chosen, self._rows, pool.cache = engine.run(device.decode, *args, logprobs=wants_logprobs(going))
        for x in jax.tree.leaves(chosen):
            x.copy_to_host_async()
        for slot in going:
            slot.chosen += 1
        return _Pending(chosen, {b: slot for b, slot in enumerate(rows) if slot is not None})

    def _collect(self) -> Iterator[Event]:
        """Reads what is in flight."""
        before, self._pending = self._pending, None
        yield from self._take(before)

    def _take(self, pending: _Pending | None) -> Iterator[Event]:
        if pending is None:
            return
        with self._engine.clock("decode_seconds"):
            values = told(pending.chosen)
        # A text that ended while its next token was in flight has no use for that token.
        for b, slot in pending.slots.items():
            if slot.live:
                self._engine.stats.decoded_tokens += 1
                yield self._push(slot, *values[b])

    def _push(self, slot: Slot, token: int, logprob: TokenLogprob | None) -> Event:
        reply = slot.reply
        if token == device.NOT_A_NUMBER:
            raise not_finite(self._engine.model, slot.tokens)
        self._engine.stats.generated_tokens += 1
        return Event(slot.request, reply, reply.push(token, logprob))
