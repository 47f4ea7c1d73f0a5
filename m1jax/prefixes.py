"""Beginnings of prompts that are remembered: a prompt that has one is read from its end on (prefix caching).

Softmax attention can go on from any token whose keys and values are there, lightning attention only from one after
which its state was kept. Kept are the states after whole prompts, from which a conversation goes on, and, where a
prompt turns out to share no more than a part of one that is remembered, after the full pages of that part: of many
prompts with the same system message the second leaves its state to those that follow.

Pages are shared with the texts; where there are too few, beginnings are forgotten before a text waits.
"""

import collections
import dataclasses
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from m1jax.pool import Pool
from m1jax.rows import Read


@dataclasses.dataclass(eq=False)
class Prefix:
    """A beginning, in one part of the batch.

    Attributes:
      part: that part.
      tokens: int32.
      pages: where their keys and values are; nobody writes into them.
      read: what it has left, in the row of its part; there is one for each.
      whole: whether a prompt ended here.
    """

    part: int
    tokens: NDArray[np.int32]
    pages: list[int]
    read: Read
    whole: bool

    def begins(self, tokens: NDArray[np.int32]) -> bool:
        """Whether a text of these tokens has it."""
        n = len(self.tokens)
        return n <= len(tokens) and tokens[n - 1] == self.tokens[-1] and np.array_equal(tokens[:n], self.tokens)


class Prefixes:
    """Those remembered, the most `limit` of them; the first is forgotten first."""

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool, self.limit = pool, limit
        self._known: list[Prefix] = []

    def longest(self, part: int, tokens: NDArray[np.int32]) -> Prefix | None:
        """The longest that a text in this part has."""
        found = (prefix for prefix in self._known if prefix.part == part and prefix.begins(tokens))
        return max(found, key=lambda prefix: len(prefix.tokens), default=None)

    def common(self, part: int, tokens: NDArray[np.int32]) -> int:
        """How many tokens a text in this part shares with any of them at most."""
        most = 0
        for prefix in self._known:
            n = min(len(prefix.tokens), len(tokens))
            if prefix.part == part and n > most:
                same = prefix.tokens[:n] == tokens[:n]
                most = max(most, n if same.all() else int(same.argmin()))
        return most

    def use(self, prefix: Prefix, length: int) -> None:
        """A prompt of so many tokens begins with it.

        If it was a whole prompt and this one is longer, the conversation has gone on, and will from there.
        """
        self._known.remove(prefix)
        self._known.insert(0 if prefix.whole and length > len(prefix.tokens) else len(self._known), prefix)

    def add(self, prefix: Prefix) -> None:
        """Remembers one more."""
        self._known.append(prefix)
        if len(self._known) > self.limit:
            self._forget(self._known[0])

    def make_room(self, part: int, pages: int, spared: Collection[Prefix | None] = ()) -> bool:
        """Whether so many pages can be taken; forgets beginnings, but not those that are spared, if that helps."""
        pool, mine = self._pool, [prefix for prefix in self._known if prefix.part == part and prefix not in spared]
        if pool.has(part, pages):
            return True
        uses = collections.Counter(page for prefix in mine for page in prefix.pages)
        if not pool.has(part, pages - sum(pool.users(part, page) == count for page, count in uses.items())):
            return False
        while not pool.has(part, pages):
            self._forget(mine.pop(0))
        return True

    def clear(self) -> None:
        """Forgets all."""
        while self._known:
            self._forget(self._known[0])

    def _forget(self, prefix: Prefix) -> None:
        self._known.remove(prefix)
        self._pool.release(prefix)
