"""Answers of a form that is asked for, a JSON Schema: which tokens may come next.

By llguidance (https://github.com/guidance-ai/llguidance), which follows a grammar token by token. The grammar is that
of the whole reply: thinking may be any text, so a token that ends it cannot begin the answer wrongly.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from m1jax.errors import UserError
from m1jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

OPEN, CLOSE = "<think>", "</think>"
# Between the parts of a JSON text, on one line or indented: without a bound a model can go on with it for ever.
SPACE = {"x-guidance": {"whitespace_pattern": r" |\n[ \t]{0,24}"}}


@functools.lru_cache(maxsize=64)  # options are checked more often than they are made
def check_schema(schema: str) -> None:
    """Raises `UserError` if this is no JSON Schema that an answer can be held to, or llguidance is missing."""
    try:
        tree = json.loads(schema)
    except ValueError as error:
        raise UserError(f"json-schema is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"json-schema must be a JSON object, not {json.dumps(tree)[:60]}")
    error = _library().LLMatcher.validate_grammar(_grammar(schema, False, False, False))
    if error:
        raise UserError(f"json-schema cannot be followed: {_brief(error)}")


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError("json-schema needs llguidance: pip install llguidance") from None
    return llguidance


def _brief(error: str) -> str:
    """What is wrong with a schema, without the place in a grammar that nobody wrote."""
    said = " ".join(itertools.takewhile(lambda line: not re.match(r" *\d+ \|", line), error.splitlines()))
    return " ".join(said.split("JSON schema: ")[-1].split()) or "it is too complex"


def _grammar(schema: str, thinking: bool, may_think: bool, marks: bool) -> str:
    """In llguidance's dialect of Lark.

    Args:
      schema: JSON Schema of the answer.
      thinking: whether the reply begins inside `<think>`.
      may_think: whether it may begin with it.
      marks: whether the tags are tokens of their own rather than text.
    """
    thought = f"thought: TEXT? {CLOSE}" if marks else f'thought[suffix="{CLOSE}"]: TEXT'
    opened = OPEN if marks else f'"{OPEN}"'
    start = "thought" if thinking else f"(SPACE? {opened} thought)?" if may_think else ""
    lines = [
        f"start: {start} SPACE? json",
        r"SPACE: / |\n{1,2}/",
        f"json: %json {json.dumps(SPACE | json.loads(schema))}",
    ]
    return "\n".join([*lines, *([thought, r"TEXT: /(?s:.*)/"] if start else [])])


class Grammars:
    """What the tokens of a vocabulary do to grammars.

    Args:
      tokenizer: knows them.
      eos_ids: those that end a text.
      size: the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], size: int) -> None:
        self._tokenizer, self._eos_ids, self._size = tokenizer, sorted(eos_ids), size

    @functools.cached_property
    def _vocabulary(self) -> "LLTokenizer":
        # One token must end texts: where none does, one more than there are.
        eos = self._eos_ids or [self._size]
        try:
            return _library().LLTokenizer(self._tokenizer.json, n_vocab=self._size + 1, eos_token=eos)
        except ValueError as error:
            raise UserError(f"json-schema cannot be followed with this tokenizer: {error}") from None

    @functools.cached_property
    def _marks(self) -> bool:
        ids = [self._tokenizer.id_of(tag) for tag in (OPEN, CLOSE)]
        return all(index is not None and self._tokenizer.is_special(index) for index in ids)

    def matcher(self, schema: str, thinking: bool, may_think: bool) -> "Matcher":
        """For a reply whose answer is to be of this form; the rest as in `m1jax.reply.Request`."""
        grammar = _grammar(schema, thinking, may_think, self._marks)
        return Matcher(_library().LLMatcher(self._vocabulary, grammar, log_level=0), self._size)


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
        """The tokens that may come next, a bit each, int32 `[V // 32 + 1]`, the lowest bit first."""
        words: NDArray[np.int32] = np.zeros((self._size // 32 + 1,), np.int32)
        if not self.failed:
            self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return np.full_like(words, -1) if self.failed else words
