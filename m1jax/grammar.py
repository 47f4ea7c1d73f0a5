"""Answers of a form that is asked for, a JSON Schema or tool calls: which tokens may come next.

By llguidance (https://github.com/guidance-ai/llguidance), which follows a grammar token by token. The grammar is that
of the whole reply: thinking may be any text, so a token that ends it cannot begin the answer wrongly.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m1jax.errors import UserError
from m1jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from m1jax.reply import Request

OPEN, CLOSE = "<think>", "</think>"
MOST_STATES = 10_000  # of the automaton of a number's multiples
MOST_ITEMS = (
    20_000  # of a row of the parser; an object of 500 properties that may be left out has llguidance's own 2,000
)
CALLS, CALLS_END = "<tool_calls>", "</tool_calls>"
# Between the parts of a JSON text, on one line or indented: without a bound a model can go on with it for ever.
SPACE = {"x-guidance": {"whitespace_pattern": r" |\n[ \t]{0,24}"}}

Tools = tuple[tuple[str, str], ...]  # of each its name, and the JSON Schema of its arguments, as JSON


@functools.lru_cache(maxsize=64)  # options are checked more often than they are made
def check_form(schema: str | None, calls: Tools) -> None:
    """Raises `UserError` if an answer cannot be held to these, as in `Request`, or llguidance is missing."""
    named = [] if schema is None else [("the JSON Schema", schema)]
    for what, text in [*named, *((f"the parameters of the tool {json.dumps(name)}", own) for name, own in calls)]:
        try:
            tree = json.loads(text)
            if not isinstance(tree, dict):
                raise UserError(f"{what} must be a JSON object, not {json.dumps(tree)[:60]}")
            _check_multiples(tree, what)
            _check_grammar(_grammar(text, ()), what)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{what} is not JSON: {error}") from None
        except RecursionError:
            raise UserError(f"{what}: nested too deeply, make it flatter") from None
    if calls:
        _check_grammar(_grammar(None, calls), "the tools' names")


def _check_grammar(grammar: str, what: str) -> None:
    error = _library().LLMatcher.validate_grammar(grammar)
    if error:
        raise UserError(f"{what} cannot be followed: {_brief(error)}: leave that out")


def _check_multiples(tree: Any, what: str) -> None:
    """Raises `UserError` for a `multipleOf` of which the automaton would take seconds or longer."""
    if isinstance(tree, dict):
        step = tree.get("multipleOf")
        if isinstance(step, int | float) and not isinstance(step, bool) and 0 < step < math.inf:
            _, digits, _ = Decimal(str(step)).as_tuple()
            rest = int("".join(map(str, digits)))
            while rest % 2 == 0 or rest % 5 == 0:
                rest //= 2 if rest % 2 == 0 else 5
            if rest > MOST_STATES:
                raise UserError(f"{what}: multipleOf = {step} is too complex to follow, leave it out")
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_multiples(value, what)


def as_json(value: Any, what: str) -> str:
    """A value of JSON, written. Raises `UserError` if it is nested too deeply."""
    try:
        return json.dumps(value)
    except RecursionError:
        raise UserError(f"{what}: nested too deeply, make it flatter") from None


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError("a JSON Schema needs llguidance: pip install llguidance") from None
    return llguidance


def _brief(error: str) -> str:
    """What is wrong with a schema, without the place in a grammar that nobody wrote."""
    said = " ".join(itertools.takewhile(lambda line: not re.match(r" *\d+ \|", line), error.splitlines()))
    return " ".join(said.split("JSON schema: ")[-1].split()) or "it is too complex"


def _grammar(
    schema: str | None, calls: Tools, thinking: bool = False, may_think: bool = False, marks: bool = False
) -> str:
    """In llguidance's dialect of Lark; `marks` says that thinking's tags are tokens of their own rather than text."""
    opened = OPEN if marks else f'"{OPEN}"'
    before = "thought" if thinking else f"(SPACE? {opened} thought)?" if may_think else ""
    answer = f'"{CALLS}\\n" (call "\\n")+ "{CALLS_END}"' if calls else "json"
    lines = [f"start: {before} SPACE? {answer}", r"SPACE: / |\n{1,2}/"]
    if before:
        # Spelled out in other tokens the tag does not end thinking for the grammar, but for who reads: not that.
        text = rf"/(?s:.*)/ & ~/(?s:.*){CLOSE.replace('/', chr(92) + '/')}(?s:.*)/" if marks else "/(?s:.*)/"
        lines += [f"thought: TEXT? {CLOSE}" if marks else f'thought[suffix="{CLOSE}"]: TEXT', f"TEXT: {text}"]
    if calls:
        lines.append("call: " + " | ".join(f"call{i}" for i in range(len(calls))))
    elif schema is not None:
        lines.append(_json("json", schema))
    for i, (name, arguments) in enumerate(calls):
        head = json.dumps(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ', ensure_ascii=False)
        lines += [f'call{i}: {head} arguments{i} "}}"', _json(f"arguments{i}", arguments)]
    return "\n".join(lines)


def _json(rule: str, schema: str) -> str:
    """The rule for a JSON text."""
    return f"{rule}: %json {json.dumps(json.loads(schema) | SPACE)}"


class Grammars:
    """What the tokens of a vocabulary do to grammars.

    Args:
      tokenizer: knows them.
      eos_ids: those that end a text.
      size: the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], size: int) -> None:
        self._tokenizer, self._eos_ids, self._size = tokenizer, sorted(eos_ids), size
        self._begun = functools.lru_cache(maxsize=32)(self._begin)

    @functools.cached_property
    def _vocabulary(self) -> "LLTokenizer":
        eos = [index for index in self._eos_ids if index < self._tokenizer.size]
        # One must end texts: where none does, any that is not text.
        eos = eos or [index for index in range(self._tokenizer.size) if self._tokenizer.is_special(index)][:1]
        if not eos:
            raise UserError("a JSON Schema cannot be followed with this tokenizer: none of its tokens ends a text")
        try:
            return _library().LLTokenizer(self._tokenizer.json, n_vocab=self._size, eos_token=eos)
        except ValueError as error:
            raise UserError(f"a JSON Schema cannot be followed with this tokenizer: {error}") from None

    @functools.cached_property
    def _marks(self) -> bool:
        ids = [self._tokenizer.id_of(tag) for tag in (OPEN, CLOSE)]
        return all(index is not None and self._tokenizer.is_special(index) for index in ids)

    def matcher(self, request: "Request") -> "Matcher | None":
        """For a reply to a request; None if its answer may be any text.

        Raises:
          UserError: the tokenizer, or the form with it, is too much for llguidance.
        """
        schema, calls = request.json_schema, request.calls
        if schema is None and not calls:
            return None
        grammar = _grammar(schema, calls, request.thinking, request.may_think, self._marks)
        return Matcher(self._begun(grammar).deep_copy(), self._size)

    def _begin(self, grammar: str) -> "LLMatcher":
        """At the beginning of a grammar, which takes milliseconds to seconds to be built; to be copied."""
        library = _library()
        limits = library.LLParserLimits(max_items_in_row=MOST_ITEMS)
        matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(f"the form of the answer cannot be followed: {_brief(matcher.get_error())}")
        return matcher


class Matcher:
    """One reply on its way through its grammar."""

    def __init__(self, inner: "LLMatcher", size: int) -> None:
        self._inner, self._size = inner, size

    def push(self, token: int) -> None:
        """Takes the next token."""
        self._inner.consume_token(token)

    @property
    def over(self) -> bool:
        """Whether nothing can follow."""
        return self._inner.is_stopped()

    @property
    def failed(self) -> bool:
        """Whether the reply has left the grammar, or that became too complex to be followed."""
        return self._inner.is_error()

    def allowed(self) -> NDArray[np.int32]:
        """The tokens that may come next, a bit each, int32 `[ceil(V / 32)]`, the lowest bit first."""
        words: NDArray[np.int32] = np.zeros((-(-self._size // 32),), np.int32)
        if not self.failed:
            self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return np.full_like(words, -1) if self.failed else words
