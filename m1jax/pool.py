"""The pages that keys and values of texts lie in: one pool of them, out of which each text takes as it grows.

A page has room for some tokens of one text. Texts that begin with the same prompt share its full pages. On a mesh
that splits rows each part of the rows has pages of its own, numbered from 0. Where the tokens of a sequence are split
over devices, so are those of a page, and each text has a single one, which is as long as the longest text.

A pool without a limit grows: pages are added, and where texts have one, made longer, to a power of two.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from m1jax import rows as device
from m1jax.state import KVCache

if TYPE_CHECKING:
    from m1jax.engine import Engine

FEWEST = 32  # pages of a pool that grows: fewer numbers of them, each of which needs programs of its own


class InPages(Protocol):
    """What has pages: a text, or a prompt that is read for several."""

    part: int
    pages: list[int]


def bucket(n: int, smallest: int = 1) -> int:
    """The power of two at or above n."""
    return max(smallest, 1 << (n - 1).bit_length())


class Pool:
    """Pages of one generation, and who has how many; see the module.

    Args:
      engine: compiles and runs; its `context` is the most tokens of a text.
      limit: how many pages each part has, from the start; None is a pool that grows.

    Attributes:
      limit: that number.
      page: how many tokens a page has room for.
      changes: how often it has changed who has which page.
    """

    def __init__(self, engine: "Engine", limit: int | None) -> None:
        self._engine, self.limit = engine, limit
        self._one_each = engine.splits_sequences
        self.page = engine.page
        self._cache: KVCache | None = None
        self._capacity = limit or 0  # pages of each part
        self.changes = 0
        self._users: list[dict[int, int]] = [{} for _ in range(engine.parts)]  # of each page that anybody has, how many
        self._returned: list[list[int]] = [[] for _ in range(engine.parts)]
        self._fresh = [0] * engine.parts  # the first page that nobody has had

    @property
    def cache(self) -> KVCache:
        """The keys and values. Whoever donates them puts back what has come of them."""
        if self._cache is None:
            pages = self._capacity * self._engine.parts
            self._cache = self._engine.run(device.empty_cache, self._engine.model, pages=pages, page=self.page)
        assert self._cache is not None
        return self._cache

    @cache.setter
    def cache(self, cache: KVCache) -> None:
        self._cache = cache

    def pages_for(self, tokens: int) -> int:
        """How many pages a text of so many tokens has."""
        return 1 if self._one_each else -(-tokens // self.page)

    def full(self, tokens: int) -> int:
        """How many of them nothing more is written into."""
        return 0 if self._one_each else tokens // self.page

    def width(self, tokens: int) -> int:
        """How many pages a row of a table has, for texts of so many tokens at most."""
        most = self.pages_for(self._engine.context)
        return most if self._engine.fixed else min(bucket(self.pages_for(tokens)), most)

    def has(self, part: int, pages: int) -> bool:
        """Whether so many can be taken."""
        return self.limit is None or self._free(part) >= pages

    def users(self, part: int, page: int) -> int:
        """How many have a page."""
        return self._users[part][page]

    def _free(self, part: int) -> int:
        return self._capacity - len(self._users[part])

    def prepare(self, longest: int, pages: Sequence[int]) -> None:
        """Grows, so that there is room for texts of up to so many tokens, and for so many pages more in each part."""
        page = max(self.page, self._engine.cache_bucket(longest)) if self._one_each else self.page
        wanted = max(len(users) + more for users, more in zip(self._users, pages, strict=True))
        fewest = 1 if self._one_each else FEWEST
        capacity = self._capacity if self.limit is not None else max(self._capacity, bucket(wanted, fewest))
        if (page, capacity) == (self.page, self._capacity):
            return
        if self._cache is not None:
            self._cache = self._engine.run(device.grow, self._cache, pages=capacity, page=page)
        self.page, self._capacity = page, capacity
        self.changes += 1

    def take(self, part: int, pages: int) -> list[int]:
        """So many pages that nobody has. Raises `MemoryError` if there are not so many, in a pool with a limit."""
        if self._free(part) < pages:
            if self.limit is not None:
                raise MemoryError(f"the pool has {self._free(part)} pages left, {pages} are wanted")
            self.prepare(1, [pages * (p == part) for p in range(len(self._users))])
        self.changes += pages > 0
        again = self._returned[part][:pages]
        first, self._fresh[part] = self._fresh[part], self._fresh[part] + pages - len(again)
        del self._returned[part][:pages]
        out = [*again, *range(first, self._fresh[part])]
        self._users[part].update(dict.fromkeys(out, 1))
        return out

    def share(self, part: int, pages: list[int]) -> list[int]:
        """The same pages, which one more has now."""
        self.changes += 1
        for page in pages:
            self._users[part][page] += 1
        return list(pages)

    def release(self, owner: InPages) -> None:
        """Takes its pages from an owner."""
        self.changes += bool(owner.pages)
        for page in owner.pages:
            self._users[owner.part][page] -= 1
            if not self._users[owner.part][page]:
                del self._users[owner.part][page]
                self._returned[owner.part].append(page)
        owner.pages = []

    def copy(self, pairs: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Copies pages, in each part (from, to)."""
        count = max(map(len, pairs))
        if count:
            padded = [(*part, *[(0, self._capacity)] * (bucket(count) - len(part))) for part in pairs]
            source, target = np.asarray(padded, np.int32).reshape(-1, 2).T
            self.cache = self._engine.run(device.copy_pages, self.cache, source, target)

    def table(self, owners: Sequence[InPages | None], width: int) -> np.ndarray:
        """The pages of each row, int32 `[B, width]`; the capacity, which is no page's number, where it has none."""
        table = np.full((len(owners), width), self._capacity, np.int32)
        for row, owner in zip(table, owners, strict=True):
            if owner is not None:
                row[: len(owner.pages)] = owner.pages
        return table
