"""Texts in the making and the prompts that they begin with: where they are in a batch, and what they need."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from m1jax.pool import bucket
from m1jax.prefixes import Prefix
from m1jax.reply import Reply, TokenLogprob
from m1jax.rows import FREE, Chosen

ROOM = 1024  # tokens that there is to be room for when a text begins, beside its prompt


@dataclasses.dataclass(eq=False)
class Slot:
    """A text, the index of its request, and its place while it is generated.

    Attributes:
      part: the part of the batch that it is in.
      pages: where its keys and values are, among that part's pages.
      chosen: how many tokens were chosen, those in flight included.
      turn: its number among all that have begun.
      prefix: from where on it is to be read.
      takes: whether that is to be forgotten for it, whose last page it then need not copy.
    """

    request: int
    reply: Reply
    part: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    chosen: int = 0
    turn: int = -1
    prefix: Prefix | None = None
    takes: bool = False
    _tokens: NDArray[np.int32] | None = None

    @property
    def live(self) -> bool:
        """Whether it goes on."""
        return self.reply.finish is None

    @property
    def begun(self) -> bool:
        """Whether there is any of it."""
        return bool(self.reply.tokens)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """What is to be read before it goes on; made once, for prompts may be long."""
        length = len(self.reply.request.tokens) + len(self.reply.tokens)
        if self._tokens is None or len(self._tokens) != length:
            self._tokens = np.asarray([*self.reply.request.tokens, *self.reply.tokens], np.int32)
        return self._tokens

    @property
    def roomy(self) -> int:
        """How many tokens there is to be room for when it begins or goes on."""
        done = len(self.reply.tokens)
        return len(self.reply.request.tokens) + done + min(self.reply.limit - done, ROOM)

    @property
    def needed(self) -> int:
        """How many tokens there must be room for, to choose the next."""
        return len(self.reply.request.tokens) + self.chosen


@dataclasses.dataclass(eq=False)
class Prompt:
    """What is read, in which part of the batch, into which pages, for which texts.

    `request` is None where it is a text that goes on, with which no other begins. `known` is how many of its tokens
    need not be read, those of `prefix` if there is one, which it may take.
    """

    request: int | None
    part: int
    tokens: NDArray[np.int32]
    slots: list[Slot] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    prefix: Prefix | None = None
    takes: bool = False
    known: int = 0


Placed = TypeVar("Placed", Slot, Prompt)


def laid_out(parts: int, placed: Sequence[Placed]) -> list[Placed | None]:
    """The rows of a batch of so many parts, in which they are in order; None is padding, of which all get as many."""
    rows = [[one for one in placed if one.part == part] for part in range(parts)]
    size = bucket(max(1, *map(len, rows)))
    return [one for part in rows for one in (*part, *[None] * (size - len(part)))]


def forced_tokens(rows: Sequence[Slot | None]) -> np.ndarray:
    """The tokens that rows must take, int32 `[B]`."""
    forced = np.full((len(rows),), FREE, np.int32)
    for b, slot in enumerate(rows):
        token = None if slot is None else slot.reply.take_forced()
        if token is not None:
            forced[b] = token
    return forced


def allowed_tokens(rows: Sequence[Slot | None]) -> NDArray[np.int32] | None:
    """The tokens that rows may take, int32 `[B, ceil(V / 32)]`, a bit each; None if all may take any."""
    allowed = {b: bits for b, slot in enumerate(rows) if slot and (bits := slot.reply.allowed()) is not None}
    if not allowed:
        return None
    out = np.full((len(rows), len(next(iter(allowed.values())))), -1, np.int32)
    for b, bits in allowed.items():
        out[b] = bits
    return out


def wants_logprobs(slots: Iterable[Slot]) -> bool:
    """Whether probabilities are to be told for any of these texts."""
    return any(slot.reply.request.logprobs is not None for slot in slots)


def told(chosen: Chosen) -> list[tuple[int, TokenLogprob | None]]:
    """The token of each row, and what is to be told of it; waits for the device."""
    tokens = np.asarray(chosen.token).tolist()
    if chosen.logprob is None:
        return [(token, None) for token in tokens]
    arrays = [np.asarray(x).tolist() for x in (chosen.logprob, chosen.best, chosen.best_logprob)]
    rows = zip(tokens, *arrays, strict=True)
    return [(token, TokenLogprob(token, own, tuple(zip(best, most, strict=True)))) for token, own, best, most in rows]
