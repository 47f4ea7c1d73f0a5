"""Documents to samples: tokens, the ones after them, and what each of these counts for in the loss."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m1jax.chat_template import ChatTemplate
from m1jax.errors import UserError
from m1jax.tokenizer import Tokenizer
from m1jax.train.documents import Place, digest

Sample = dict[str, NDArray[Any]]

_MOST = float(np.finfo(np.float32).max)  # that a weight may be

# What tokens, ends of turns and chat template come from.
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def fingerprint(tokenizer: Tokenizer | None) -> str:
    """Digest of a tokenizer's files, empty without one."""
    if tokenizer is None:
        return ""
    files = [tokenizer.folder / name for name in _TOKENIZER]
    return digest([(file.name, file.read_bytes()) for file in files if file.is_file()])


@contextlib.contextmanager
def _blamed(place: Place) -> Iterator[None]:
    """Puts the document's place into a `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        if str(place) not in str(error):
            error.args = (f"{place}: {error}",)
        raise


class TooLong(UserError):
    """A conversation of so many tokens does not fit in a row."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"the conversation has {tokens} tokens: raise data.length or remove it")
        self.tokens = tokens


class Encoder:
    """Documents to samples.

    Args:
      tokenizer: of the model; None if all files hold tokens.
      length: tokens of a row.
      vocab_size: V, which no token may reach.
      end: token after each text document, if any.
    """

    def __init__(self, tokenizer: Tokenizer | None, length: int, vocab_size: int, end: int | None) -> None:
        self._tokenizer, self._length, self._vocab_size, self._end = tokenizer, length, vocab_size, end

    def __call__(self, document: tuple[Place, Any]) -> list[Sample]:
        """Samples of a document; empty for one of fewer than two tokens. Raises `UserError` naming its place."""
        place, value = document
        with _blamed(place):
            return self._text(value, place.ends) if isinstance(value, str) else self._samples(value)

    def check(self, document: tuple[Place, Any]) -> None:
        """Raises the `UserError` that the call would, without encoding texts, which takes long."""
        place, value = document
        with _blamed(place):
            text = value.get("text") if isinstance(value, dict) else value
            if isinstance(text, str):
                self._need_tokenizer().check(text)
            else:
                self._samples(value)

    def _samples(self, value: Any) -> list[Sample]:
        if isinstance(value, np.ndarray):
            return self._cut(value, np.ones(len(value), np.float32))
        if "text" in value:
            if not isinstance(value["text"], str):
                raise UserError("text is not a string")
            return self._text(value["text"])
        if "tokens" in value:
            return self._encoded(value)
        tokens, weights = chat_tokens(self._need_tokenizer(), _messages(value), _tools(value))
        if len(tokens) - 1 > self._length:
            raise TooLong(len(tokens))
        return self._cut(tokens, weights)

    def _encoded(self, value: Mapping[str, Any]) -> list[Sample]:
        try:
            tokens = np.asarray(value["tokens"])
            if not np.issubdtype(tokens.dtype, np.integer) and tokens.size:
                raise TypeError
            weights = np.asarray(value.get("weights", np.ones(len(tokens))), np.float32)
        except (TypeError, ValueError, OverflowError):
            raise UserError("tokens or weights is not a list of numbers") from None
        if tokens.ndim != 1 or weights.shape != tokens.shape:
            raise UserError(f"tokens and weights must be lists of one length, not {tokens.shape} and {weights.shape}")
        if not np.all(np.isfinite(weights) & (weights >= 0)):
            raise UserError("weights must be finite, and 0 or more")
        return self._cut(tokens, weights)

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("text needs a tokenizer: set model.tokenizer")
        return self._tokenizer

    def _text(self, text: str, ends: bool = True) -> list[Sample]:
        ids = self._need_tokenizer().encode(text)
        tokens = np.asarray([*ids, *([self._end] if ends and self._end is not None else [])], np.int32)
        return self._cut(tokens, np.ones(len(tokens), np.float32))

    def _cut(self, tokens: NDArray[np.integer[Any]], weights: NDArray[np.float32]) -> list[Sample]:
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if outside.size:
            raise UserError(f"token {outside[0]} is outside the model's vocabulary of {self._vocab_size}")
        tokens = tokens.astype(np.int32)
        stretches = [slice(at, at + self._length + 1) for at in range(0, len(tokens) - 1, self._length)]
        return [
            {"tokens": tokens[part][:-1], "targets": tokens[part][1:], "weights": weights[part][1:]}
            for part in stretches
        ]


def _messages(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "messages" in value:
        if not isinstance(value["messages"], list) or not all(isinstance(m, dict) for m in value["messages"]):
            raise UserError("messages is not a list of objects")
        return value["messages"]
    if "prompt" in value and "response" in value:
        turns = (("user", value["prompt"]), ("assistant", value["response"]))
        return [{"role": role, "content": text} for role, text in turns]
    raise UserError(f"has neither text, tokens, messages, nor prompt and response, but {', '.join(value) or 'nothing'}")


def _tools(value: Mapping[str, Any]) -> list[Any]:
    if not isinstance(value.get("tools") or [], list):
        raise UserError("tools is not a list")
    return value.get("tools") or []


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens `[n]` of a conversation and weights: 1 for what the assistant says, to the end of its turn, else 0.

    Each turn is encoded by itself, as generation sees it: the prompt is tokens before the answer begins. A message's
    own `weight` takes the place of the 1, its `reasoning_content` or `reasoning` comes before its content, in the tags
    that M1 thinks in. `tools` are the functions on offer, as the chat template takes them.

    Raises:
      UserError: there is no chat template or no assistant, the template changes earlier turns, or a message is not as
        it should be.
    """
    if tokenizer.template is None:
        raise UserError(f"{tokenizer.folder} has no chat template: conversations need one")
    template = _template(tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    done = ""
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        after = template.render(messages[: i + 1], tools, add_generation_prompt=False)
        before = template.render(messages[:i], tools) if i else _opened(template, message, after, tools)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template writes earlier turns differently later on: give single turns")
        prompt, answer = tokenizer.encode(before[len(done) :]), tokenizer.encode(after[len(before) :])
        last = next((n + 1 for n, token in enumerate(answer) if token in tokenizer.eos_ids), len(answer))
        ids += prompt + answer
        weights += [0.0] * len(prompt) + [_weight(message)] * last + [0.0] * (len(answer) - last)
        done = after
    if not done:
        raise UserError("the conversation has no assistant's message to learn")
    return np.asarray(ids, np.int32), np.asarray(weights, np.float32)


def _weight(message: Mapping[str, Any]) -> float:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MOST:
        raise UserError(f"weight {weight!r} of a message must be a number, 0 or more, that float32 holds")
    return float(weight)


def _opened(template: ChatTemplate, message: Mapping[str, Any], after: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """What comes before the words of an assistant who speaks first: no template renders the empty conversation.

    Its turn opens as the one does that the template would add next. `after` is the conversation of this message.
    """
    whole = template.render([message], tools)
    opening = whole.removeprefix(after)
    return after[: after.index(opening) + len(opening)] if opening in after else whole


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    assert tokenizer.template is not None
    return ChatTemplate(tokenizer.template, tokenizer.special)
