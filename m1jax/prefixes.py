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
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from m1jax import rows as device
from m1jax.pool import Pool
from m1jax.rows import Read

if TYPE_CHECKING:
    from m1jax.engine import Engine


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

    def common(self, part: int, tokens: NDArray[np.int32]) -> int:
        """How many tokens a text in this part shares with any of them at most."""
        most = 0
        for prefix in self._known[part]:
            n = min(len(prefix.tokens), len(tokens))
            if n > most:
                same = prefix.tokens[:n] == tokens[:n]
                most = max(most, n if same.all() else int(same.argmin()))
        return most

    def use(self, prefix: Prefix, length: int) -> None:
        """A prompt of so many tokens is read from its end on: it is the last to be forgotten now."""
        known = self._known[prefix.part]
        known.append(known.pop(known.index(prefix)))
        prefix.whole |= length == prefix.tokens.size

    def take(self, prefix: Prefix) -> list[int]:
        """The pages of one that is forgotten, and theirs who asks."""
        self._known[prefix.part].remove(prefix)
        pages, prefix.pages = prefix.pages, []
        return pages

    def read(self, read: Read, prefixes: dict[int, Prefix]) -> Read:
        """`read` with what beginnings have left in the given rows."""
        if not prefixes:
            return read
        assert self._left is not None
        source = np.arange(read.logits.shape[0], dtype=np.int32)
        for row, prefix in prefixes.items():
            source[row] = len(source) + prefix.part * self.limit + prefix.row
        return self._engine.run(device.pick, (read, self._left), source)

    def add(
        self,
        part: int,
        tokens: NDArray[np.int32],
        pages: list[int],
        read: Read,
        row: int,
        whole: bool,
        after: Prefix | None = None,
    ) -> None:
        """Remembers what a row of a part, counted there, has left after these tokens in `read`.

        If what they come `after` was a whole prompt, the conversation has gone on and will from here: that is the first
        to be forgotten now.
        """
        known, parts = self._known[part], len(self._known)
        if after is not None and after.whole and after in known:
            known.insert(0, known.pop(known.index(after)))
        if len(known) == self.limit:
            self._forget(known[0])
        free = next(iter(set(range(self.limit)) - {prefix.row for prefix in known}))
        if self._left is None:
            self._left = self._engine.run(device.empty, self._engine.model, B=parts * self.limit)
        source, target = np.zeros(parts, np.int32), np.full(parts, self.limit, np.int32)
        source[part], target[part] = row, free
        self._left = self._engine.run(device.keep, self._left, read, source, target)
        known.append(Prefix(part, tokens, pages, free, whole))

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
