"""From what a user asks for to a `Request`: chat template, thinking, and the options of one text."""

import argparse
import dataclasses
import functools
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from m1jax.arguments import MOST_TEXTS
from m1jax.chat_template import ChatTemplate, Message
from m1jax.errors import UserError
from m1jax.grammar import as_json
from m1jax.reply import EMPTY_THINKING, FORCED_CLOSE, OPEN, Request
from m1jax.sampling import DEFAULT_SAMPLING, MAX_SEED, Sampling
from m1jax.tokenizer import Tokenizer

# Options that may be given in JSON, and their types.
OPTIONS: dict[str, tuple[type, ...]] = {
    "system": (str,),
    "raw": (bool,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "greedy": (bool,),
    "seed": (int,),
    "stop": (str, list),
    "n": (int,),
    "thinking_budget": (int,),
    "logprobs": (int,),
    "json_schema": (dict,),
    "no_thinking": (bool,),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to prompt and generate: those of the command line, which a line of a JSONL file may change.

    `raw` feeds the prompt as it stands, without chat template; `system` is a system message put first; `no_thinking`
    gives the model an empty thinking block. The others are as in `Request`.
    """

    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0
    n: int = 1
    max_tokens: int = 4096
    stop: tuple[str, ...] = ()
    thinking_budget: int | None = None
    logprobs: int | None = None
    json_schema: str | None = None
    no_thinking: bool = False
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.raw and self.system is not None:
            raise UserError("a system prompt needs the chat template: drop --system or --raw")
        if self.raw and self.no_thinking:
            raise UserError(
                "--raw feeds the prompt as it stands: drop --no-thinking, or write the empty block yourself"
            )
        if self.no_thinking and self.thinking_budget is not None:
            raise UserError("--no-thinking and --thinking-budget contradict each other: drop one")
        self.request((0,), False)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """The options that the command line gives."""
        temperature = 0.0 if args.greedy else 1.0 if args.temperature is None else args.temperature
        seed = args.seed
        if seed is None:
            # A continued run must draw what the first one would have.
            seed = 0 if args.input is not None else secrets.randbelow(MAX_SEED + 1)
        return cls(
            sampling=Sampling(temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty),
            seed=seed,
            n=args.n,
            max_tokens=args.max_tokens,
            stop=tuple(args.stop),
            thinking_budget=args.thinking_budget,
            logprobs=args.logprobs,
            json_schema=args.json_schema,
            no_thinking=args.no_thinking,
            raw=args.raw,
            system=args.system,
        )

    def changed(self, values: Mapping[str, Any]) -> "Options":
        """These options with those of `OPTIONS` that are in `values`, and not None, in their place.

        Raises:
          UserError: one is of another type, out of range, or contradicts another.
        """
        given: dict[str, Any] = {}
        for key, types in OPTIONS.items():
            value = values.get(key)
            if value is None:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise UserError(
                    f"{key} must be of type {' or '.join(t.__name__ for t in types)}, not {reprlib.repr(value)}"
                )
            given[key] = value
        if given.get("n", 1) > MOST_TEXTS:
            raise UserError(f"n must be at most {MOST_TEXTS}, not {reprlib.repr(given['n'])}")
        greedy = given.pop("greedy", None)
        if greedy:
            if given.get("temperature"):
                raise UserError("greedy and a temperature above 0 contradict each other: drop one")
            given["temperature"] = 0.0
        elif greedy is False and self.sampling.temperature == 0:
            given.setdefault("temperature", DEFAULT_SAMPLING.temperature)
        if "stop" in given:
            given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
            if not all(isinstance(item, str) for item in given["stop"]):
                raise UserError("stop must be a string or a list of strings")
        if "json_schema" in given:
            given["json_schema"] = as_json(given["json_schema"], "json_schema")
        sampling = {key: given.pop(key) for key in _SAMPLING if key in given}
        # A line that switches to one of two contradicting options switches the other off.
        if given.get("raw"):
            given.setdefault("system", None)
        if "thinking_budget" in given:
            given.setdefault("no_thinking", False)
        elif given.get("no_thinking"):
            given["thinking_budget"] = None
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **sampling), **given)

    def request(self, tokens: Sequence[int], thinking: bool) -> Request:
        """The request for a prompt of these tokens that ends inside `<think>` or not."""
        return Request(
            tokens=tuple(tokens),
            sampling=self.sampling,
            seed=self.seed,
            n=self.n,
            max_tokens=self.max_tokens,
            stop=self.stop,
            thinking_budget=self.thinking_budget,
            logprobs=self.logprobs,
            json_schema=self.json_schema,
            thinking=thinking,
            may_think=not self.no_thinking,
        )


class Prompter:
    """Makes requests for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer folder's chat template. Raises `UserError` if it has none."""
        if self.tokenizer.template is None:
            raise UserError(
                f"{self.tokenizer.folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): add it, or use --raw for plain text"
            )
        return ChatTemplate(self.tokenizer.template, self.tokenizer.special)

    def plain(self, prompt: str, options: Options) -> Request:
        """A request for a prompt, by the chat template unless `options.raw`. Raises `UserError` if it is empty."""
        if not (prompt if options.raw else prompt.strip()):
            raise UserError("the prompt is empty: give some text")
        if not options.raw:
            return self.chat([{"role": "user", "content": prompt}], options)
        return options.request(self.tokenizer.encode(prompt), ends_inside_thinking(prompt))

    def chat(
        self, messages: Sequence[Message], options: Options, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Request:
        """A request for a conversation."""
        if options.raw:
            raise UserError("messages need the chat template: give a prompt, or drop --raw")
        text = "".join(self.text(messages, options, tools))
        return options.request(self.tokenizer.encode(text), ends_inside_thinking(text))

    def text(
        self, messages: Sequence[Message], options: Options, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, str]:
        """The prompt text of a conversation, and the beginning of the reply that is put in the model's mouth."""
        if options.system is not None:
            messages = [{"role": "system", "content": options.system}, *messages]
        text = self.template.render(messages, tools)
        if not options.no_thinking:
            return text, ""
        # Some templates open the thinking block themselves: then it only needs to be closed.
        return text, FORCED_CLOSE if ends_inside_thinking(text) else EMPTY_THINKING


def ends_inside_thinking(prompt: str) -> bool:
    """Whether the reply starts inside `<think>`. Only the end counts: a user may write the tag as well."""
    return prompt.rstrip().endswith(OPEN)
