"""Beginnings of prompts that are remembered: a prompt that has one is read from its end on (prefix caching).

Softmax attention can go on from any token whose keys and values are there, lightning attention only from one after
which its state was kept. Kept are the states after whole prompts, from which a conversation goes on, and, where a
prompt turns out to share no more than a part of one that is remembered, after the full pages of that part: of many
prompts with the same system message the second leaves its state to those that follow.

Pages are shared with the texts; where there are too few, beginnings are forgotten before a text waits. What else a
beginning has left is a row of arrays made once, of which each part of a mesh that has rows of its own has as many.
"""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from m1jax import rows as device
from m1jax.pool import Pool
from m1jax.rows import Read

if TYPE_CHECKING:
    from m1jax.engine import Engine
    from m1jax.slots import Prompt


@dataclasses.dataclass(eq=False)
class Prefix:
    """A beginning, in one part of the batch.

    Attributes:
      part: that part.
      tokens: int32.
      pages: where their keys and values are; nobody writes into them.
      row: where what else they have left is, among the rows of its part.
      whole: whether a prompt ended here.
    """

    part: int
    tokens: NDArray[np.int32]
    pages: list[int]
    row: int
    whole: bool

    def begins(self, tokens: NDArray[np.int32]) -> bool:
        """Whether a text of these tokens has it."""
        n = len(self.tokens)
        return n <= len(tokens) and tokens[n - 1] == self.tokens[-1] and np.array_equal(tokens[:n], self.tokens)


class Prefixes:
    """Those remembered, in each part the most `limit`; of each part the first is forgotten first.

    Args:
      engine: compiles and runs.
      pool: of their pages.
      limit: how many.
    """

    def __init__(self, engine: "Engine", pool: Pool, limit: int) -> None:
        self._engine, self._pool, self.limit = engine, pool, limit
        self._known: list[list[Prefix]] = [[] for _ in range(engine.parts)]
        self._left: Read | None = None

    def longest(self, part: int, tokens: NDArray[np.int32]) -> Prefix | None:
        """The longest that a text in this part has."""
        found = (prefix for prefix in self._known[part] if prefix.begins(tokens))
        return max(found, key=lambda prefix: len(prefix.tokens), default=None)

    def parting(self, prompt: "Prompt") -> int | None:
        """After how many tokens, in full pages, a prompt parts from what is remembered; None if that is hardly more
        than what is known of it.
        """
        tokens, most = prompt.tokens, 0
        for prefix in self._known[prompt.part]:
            n = min(len(prefix.tokens), len(tokens) - 1)
            if n > most:
                same = prefix.tokens[:n] == tokens[:n]
                most = max(most, n if same.all() else int(same.argmin()))
        most = self._pool.full(most) * self._pool.page
        return most if most >= prompt.known + self._pool.page else None

    def begin(self, prompt: "Prompt") -> list[int]:
        """Gives a prompt the pages of its prefix; the page of which it is to have a copy, if there is one.

        The prefix is the last to be forgotten then, or is forgotten, if the prompt takes it.
        """
        prefix = prompt.prefix
        if prefix is None:
            return []
        prompt.known, known = prefix.tokens.size, self._known[prefix.part]
        known.remove(prefix)
        if prompt.takes:
            prompt.pages, prefix.pages = prefix.pages, []
            return []
        known.append(prefix)
        prefix.whole |= prompt.known == len(prompt.tokens)
        full = self._pool.full(prompt.known)
        prompt.pages = self._pool.share(prompt.part, prefix.pages[:full])
        return prefix.pages[full:]

    def read(self, read: Read, rows: Sequence["Prompt | None"]) -> Read:
        """`read` with what the prefixes of the prompts in its rows have left."""
        source = np.arange(len(rows), dtype=np.int32)
        for row, prompt in enumerate(rows):
            if prompt is not None and prompt.prefix is not None:
                source[row] = len(rows) + prompt.part * self.limit + prompt.prefix.row
        if source.max() < len(rows):
            return read
        assert self._left is not None
        return self._engine.run(device.pick, (read, self._left), source)

    def remember(
        self, prompt: "Prompt", read: Read, rows: Sequence["Prompt | None"], length: int, owed: Sequence[int]
    ) -> None:
        """Remembers so many tokens of a prompt, if they fill a page, and if there is one for a copy of the last where
        that is not full, beside those that are `owed` in each part.

        If this is the whole prompt, and it went on from another, the conversation has gone on and will from here: that
        is the first to be forgotten now.
        """
        pool, part, parts = self._pool, prompt.part, len(self._known)
        full = pool.full(length)
        last = prompt.pages[full : pool.pages_for(length)]
        if not (self.limit and full and self.make_room(part, owed[part] + len(last))):
            return
        pages = [*pool.share(part, prompt.pages[:full]), *pool.take(part, len(last))]
        pool.copy([[*zip(last, pages[full:], strict=True)] if p == part else [] for p in range(parts)])
        known, whole, before = self._known[part], length == len(prompt.tokens), prompt.prefix
        if whole and before is not None and before.whole and before in known:
            known.insert(0, known.pop(known.index(before)))
        if len(known) == self.limit:
            self._forget(known[0])
        free = min(set(range(self.limit)) - {prefix.row for prefix in known})
        if self._left is None:
            self._left = self._engine.run(device.empty, self._engine.model, B=parts * self.limit)
        source, target = np.zeros(parts, np.int32), np.full(parts, self.limit, np.int32)
        source[part], target[part] = rows.index(prompt) % (len(rows) // parts), free
        self._left = self._engine.run(device.keep, self._left, read, source, target)
        known.append(Prefix(part, prompt.tokens[:length], pages, free, whole))

    def make_room(self, part: int, pages: int, spared: Collection[Prefix | None] = ()) -> bool:
        """Whether so many pages can be taken; forgets beginnings, but not those that are spared, if that helps."""
        pool, mine = self._pool, [prefix for prefix in self._known[part] if prefix not in spared]
        if pool.has(part, pages):
            return True
        uses = collections.Counter(page for prefix in mine for page in prefix.pages)
        if not pool.has(part, pages - sum(pool.users(part, page) == count for page, count in uses.items())):
            return False
        while not pool.has(part, pages):
            alone = (prefix for prefix in mine if any(pool.users(part, page) == 1 for page in prefix.pages))
            first = next(alone, mine[0])  # who shares all pages gives none back
            mine.remove(first)
            self._forget(first)
        return True

    def clear(self) -> None:
        """Forgets all."""
        for prefix in itertools.chain.from_iterable(map(list, self._known)):
            self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        self._known[prefix.part].remove(prefix)
        self._pool.release(prefix)
