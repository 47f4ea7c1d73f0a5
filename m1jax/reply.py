"""What the host knows of one text being generated: its tokens, its text, its thinking, and when to stop.

Tokens go through three stages: detokenising, stop strings (text that may turn out to be one is held back), and
marking what lies between `<think>` and `</think>`. M1 has no tokens of its own for these two tags, so they are found in
the text.
"""

import collections
import dataclasses
import enum
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m1jax.errors import UserError
from m1jax.grammar import CLOSE, OPEN, Matcher, Tools, check_form
from m1jax.sampling import ALTERNATIVES, DEFAULT_SAMPLING, MAX_SEED, Sampling
from m1jax.tokenizer import Detokeniser, Tokenizer

FORCED_CLOSE = f"\n{CLOSE}\n"  # as M1 closes its thinking
EMPTY_THINKING = f"{OPEN}\n\n{CLOSE}\n"


class TokenLogprob(NamedTuple):
    """The logarithm of a token's probability by the model, and the most probable tokens with theirs, falling."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


# "complete": nothing can follow in the form that the answer is held to.
Finish = Literal["eos", "stop", "complete", "length", "context", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what to do with it.

    Attributes:
      tokens: the prompt.
      sampling: how tokens are chosen.
      seed: with the sample's index, the source of all randomness.
      n: how many texts to generate.
      max_tokens: the most tokens to generate.
      stop: strings that end the text; they are not part of it.
      thinking_budget: the most tokens inside `<think>`; then its end is put in. None is no limit.
      thinking: whether the prompt ends inside `<think>`.
      logprobs: None, or how many of the most probable tokens are told, beside each token chosen, with the logarithms of
        their probabilities by the model: those of its logits, before temperature, penalty and filters.
      json_schema: None, or the JSON Schema, as JSON, that the text after thinking is held to.
      calls: or the tools, by name and JSON Schema of their arguments, of which that text is calls, one or more.
      may_think: False if thinking is over before the text starts, so that a `<think>` in it is plain text.

    Raises:
      UserError: a value out of range.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0
    n: int = 1
    max_tokens: int = 4096
    stop: tuple[str, ...] = ()
    thinking_budget: int | None = None
    logprobs: int | None = None
    json_schema: str | None = None
    calls: Tools = ()
    thinking: bool = False
    may_think: bool = True

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UserError("the prompt is empty: give some text")
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling must be a Sampling, not {self.sampling!r}")
        for name in ("seed", "n", "max_tokens", "thinking_budget", "logprobs"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole and (name not in ("thinking_budget", "logprobs") or value is not None):
                raise UserError(f"{name.replace('_', '-')} must be an integer, not {value!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise UserError(f"stop must be a tuple of strings, not {self.stop!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be from 0 to {MAX_SEED}, not {self.seed}")
        if self.n < 1:
            raise UserError(f"n must be 1 or more, not {self.n}")
        if self.max_tokens < 1:
            raise UserError(f"max-tokens must be 1 or more, not {self.max_tokens}")
        if "" in self.stop:
            raise UserError("a stop string is empty: give some text")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise UserError(f"thinking-budget must be 0 or more, not {self.thinking_budget}")
        if self.logprobs is not None and not 0 <= self.logprobs <= ALTERNATIVES:
            raise UserError(f"logprobs must be from 0 to {ALTERNATIVES}, not {self.logprobs}")
        if self.json_schema is not None and self.calls:
            raise UserError("json-schema and calls contradict each other: drop one")
        if self.json_schema is not None or self.calls:
            check_form(self.json_schema, self.calls)


def check_context(prompt: int, context: int) -> None:
    """Raises `UserError` if a prompt of so many tokens leaves no room for an answer."""
    if prompt >= context:
        raise UserError(f"the prompt has {prompt} tokens, the model's context is {context}: shorten the prompt")


class Segment(NamedTuple):
    """A piece of generated text, and whether it is thinking (the tags included)."""

    text: str
    thinking: bool


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


class Phase(enum.Enum):
    """Where in its reply the model is; `<think>` counts only at the very start."""

    START = "start"
    THINKING = "thinking"
    ANSWER = "answer"


class ThinkingSplitter:
    """Cuts streamed text into thinking and answer."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.held = ""  # may be the beginning of a tag
        self._last = ""

    def feed(self, text: str) -> list[Segment]:
        """The segments that are certain now."""
        text, self.held = self.held + text, ""
        out: list[Segment] = []
        if self.phase is Phase.START:
            body = text.lstrip()
            if body.startswith(OPEN):
                self.phase = Phase.THINKING
                cut = len(text) - len(body) + len(OPEN)
                out.append(Segment(text[:cut], True))
                text = text[cut:]
            elif OPEN.startswith(body):
                self.held = text
                return []
            else:
                self.phase = Phase.ANSWER
        if self.phase is Phase.THINKING:
            inside, found, rest = text.partition(CLOSE)
            if not found:
                self.held = text[len(text) - overlap(text, CLOSE) :]
                inside, rest = text[: len(text) - len(self.held)], ""
            else:
                self.phase = Phase.ANSWER
            out.append(Segment(inside + found, True))
            self._last = (self._last + inside)[-1:]
            text = rest
        return [segment for segment in [*out, Segment(text, False)] if segment.text]

    def flush(self) -> list[Segment]:
        """What was held back in case it became a tag."""
        text, self.held = self.held, ""
        return [Segment(text, self.phase is Phase.THINKING)] if text else []

    def closing(self) -> str:
        """The text that ends thinking from here, completing a tag that has begun."""
        if self.held:
            return FORCED_CLOSE[FORCED_CLOSE.index(self.held) + len(self.held) :]
        return FORCED_CLOSE.lstrip("\n") if self._last == "\n" else FORCED_CLOSE


class StopFilter:
    """Ends streamed text before the first stop string, and never lets a part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = len(text) - max((overlap(text, stop) for stop in self._stops), default=0)
        text, self._held = text[:keep], text[keep:]
        return text

    def flush(self) -> str:
        """What was held back in case it became a stop string."""
        text, self._held = self._held, ""
        return text


class Reply:
    """One text in the making, and what becomes of each token.

    Args:
      request: what is asked for.
      sample: which of the request's n texts this is.
      tokenizer: turns tokens into text.
      eos_ids: tokens that end the text.
      context: the most tokens, prompt included, that the model can read.
      matcher: follows the request's `json_schema` or `calls`, where it has them.

    Attributes:
      tokenizer: that one.
      tokens: the tokens generated, the one that ended the text included.
      logprobs: of these tokens, where the request wants them.
      segments: the text shown so far.
      cached_tokens: those of the prompt that were not read, since they had been before.
      finish: why it ended, None while it goes on.
    """

    def __init__(
        self,
        request: Request,
        sample: int,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        context: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.request, self.sample = request, sample
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.segments: list[Segment] = []
        self.cached_tokens = 0
        self.finish: Finish | None = None
        self.limit = min(request.max_tokens, context - len(request.tokens))
        self.tokenizer, self._eos_ids, self._matcher = tokenizer, eos_ids, matcher
        phase = Phase.THINKING if request.thinking else Phase.START if request.may_think else Phase.ANSWER
        self._detokeniser = Detokeniser(tokenizer, keep=(OPEN, CLOSE))
        self._stops = StopFilter(request.stop)
        self._shown = ThinkingSplitter(phase)
        # The budget follows the text as generated: what the stop filter holds back is already thought.
        self._thought = ThinkingSplitter(phase)
        self._thinking_tokens = 0
        self._forced: collections.deque[int] | None = None
        if request.thinking:
            self._spend_budget()

    @property
    def text(self) -> str:
        """The text shown so far, tags included."""
        return "".join(segment.text for segment in self.segments)

    @property
    def thinking(self) -> str | None:
        """What was thought, without the tags; None if nothing was."""
        text = "".join(segment.text for segment in self.segments if segment.thinking)
        if not text and not self.request.thinking:
            return None
        return text.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()

    @property
    def answer(self) -> str:
        """The text after thinking."""
        return "".join(segment.text for segment in self.segments if not segment.thinking).lstrip("\n")

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Segment]:
        """Takes the next token; returns the text that is now certain."""
        self.tokens.append(token)
        if self._matcher is not None and self._matcher.failed:  # while it told what may come: this was any token
            return self.end("length")
        if logprob is not None and self.request.logprobs is not None:
            self.logprobs.append(logprob._replace(best=logprob.best[: self.request.logprobs]))
        if token in self._eos_ids:
            return self.end("eos")
        if self._matcher is not None:
            self._matcher.push(token)
        text = self._detokeniser.push(token)
        self._count(text)
        segments = self._show(self._stops.feed(text))
        if self._stops.stopped:
            segments += self.end("stop")
        elif self._matcher is not None and self._matcher.failed:
            segments += self.end("length")
        elif self._matcher is not None and self._matcher.over:
            segments += self.end("complete")
        elif len(self.tokens) >= self.limit:
            segments += self.end("length" if self.limit == self.request.max_tokens else "context")
        return segments

    def end(self, reason: Finish) -> list[Segment]:
        """Ends the text; returns what was held back."""
        segments = self._show(self._stops.feed(self._detokeniser.flush()) + self._stops.flush())
        rest = self._shown.flush()
        self.segments += rest
        self.finish = "stop" if self._stops.stopped else reason
        return segments + rest

    def take_forced(self) -> int | None:
        """The token that must come next instead of a sampled one, if any."""
        return self._forced.popleft() if self._forced else None

    def allowed(self) -> NDArray[np.int32] | None:
        """The tokens that may come next, as `Matcher.allowed` has them; None if all may."""
        return None if self._matcher is None else self._matcher.allowed()

    @property
    def must_be_current(self) -> bool:
        """Whether the next token can only be chosen once every token before it has been pushed."""
        if self._matcher is not None:
            return True
        budget = self.request.thinking_budget
        if budget is None or self._forced is not None or self._thought.phase is Phase.ANSWER:
            return False
        return budget - self._thinking_tokens <= 1

    def _show(self, text: str) -> list[Segment]:
        segments = self._shown.feed(text) if text else []
        self.segments += segments
        return segments

    def _count(self, text: str) -> None:
        before = self._thought.phase
        self._thought.feed(text)
        if self._thought.phase is Phase.THINKING:
            self._thinking_tokens += before is Phase.THINKING
            self._spend_budget()

    def _spend_budget(self) -> None:
        budget = self.request.thinking_budget
        if self._matcher is not None and self._detokeniser.inside_character:
            return  # its grammar wants the rest of the character first
        if budget is not None and self._thinking_tokens >= budget and self._forced is None:
            self._forced = collections.deque(self.tokenizer.encode(self._thought.closing()))
