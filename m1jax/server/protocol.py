"""What OpenAI's chat completions and completions say in JSON: bodies to requests, replies to answers and their pieces.

After https://platform.openai.com/docs/api-reference/chat, with `reasoning_content` for thinking as other servers of
reasoning models have it, and M1's `<tool_calls>` (`chat_template.py`) as `tool_calls`. A field that would change the
reply and is not known here is refused.
"""

import dataclasses
import json
import reprlib
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m1jax.errors import UserError
from m1jax.grammar import CALLS, CALLS_END, Tools, as_json
from m1jax.prompt import OPTIONS, Options, Prompter, ends_inside_thinking
from m1jax.reply import CLOSE, OPEN, Reply, Request, Segment, StopFilter
from m1jax.sampling import ALTERNATIVES, MAX_SEED

MOST = 128  # texts of one request
MOST_STOPS = 64  # strings that end a text, for which every piece of text is searched
PLAIN_TOKENS = 16  # of a text to go on from, where nothing is said of it, as OpenAI has it
# Fields that change nothing here.
IGNORED = ("user", "metadata", "store", "parallel_tool_calls", "service_tier", "prompt_cache_key", "safety_identifier")
# Fields of which only the value that asks for nothing is taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
}
FINISH = {"eos": "stop", "stop": "stop", "complete": "stop", "length": "length", "context": "length"}
_OWN = (
    "model",
    "messages",
    "prompt",
    "tools",
    "stream",
    "stream_options",
    "max_completion_tokens",
    "chat_template_kwargs",
    "top_logprobs",
    "response_format",
    "tool_choice",
)
_KNOWN = {*IGNORED, *NEUTRAL, *OPTIONS, *_OWN} - {"system", "raw", "greedy", "no_thinking", "json_schema"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
      requests: what to generate; several only of plain text.
      chat: whether it is a chat's, or plain text to go on from.
      tools: whether the reply may call tools.
      stream: whether the reply is sent piece by piece.
      usage: whether the last piece of a stream tells how many tokens there were.
    """

    requests: tuple[Request, ...]
    chat: bool
    tools: bool
    stream: bool
    usage: bool

    @property
    def request(self) -> Request:
        """The first: how to generate is the same for all."""
        return self.requests[0]

    def texts(self) -> list[tuple[int, int]]:
        """All texts, in their order: the request's index and the sample's."""
        return [(i, k) for i, request in enumerate(self.requests) for k in range(request.n)]


def read(body: Any, chat: bool, prompter: Prompter, options: Options) -> Asked:
    """What a body asks for.

    Args:
      body: the JSON value that was sent.
      chat: whether it was sent to chat completions.
      prompter: makes the prompt.
      options: what holds where the body says nothing.

    Raises:
      UserError: it asks for what cannot be done; names the field.
    """
    if not isinstance(body, dict):
        raise UserError('the body is not a JSON object: send {"model": …, "messages": [...]}')
    given = {key: value for key, value in body.items() if value is not None}
    _check(given, chat)
    values: dict[str, Any] = {key: given.get(key) for key in OPTIONS}
    values["seed"] = given["seed"] % (MAX_SEED + 1) if "seed" in given else secrets.randbelow(MAX_SEED + 1)
    if chat:
        values["logprobs"] = given.get("top_logprobs", 0) if given.get("logprobs") else None
    elif given.get("logprobs") is False:
        values["logprobs"] = None
    if "max_completion_tokens" in given:
        values["max_tokens"] = given["max_completion_tokens"]
    if given.get("top_k") == -1:  # other servers' word for all
        values["top_k"] = 0
    if given.get("chat_template_kwargs", {}).get("enable_thinking") is False:
        values["no_thinking"] = True
    values["json_schema"] = _schema(given.get("response_format", {"type": "text"}))
    if not chat:
        options = dataclasses.replace(options, raw=True, max_tokens=PLAIN_TOKENS)
    options = options.changed(values)
    tools = given.get("tools") if given.get("tool_choice") != "none" else None
    if tools and values["json_schema"] is not None:
        raise UserError('response_format and tools contradict each other here: drop one, or send tool_choice = "none"')
    if chat:
        messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in given["messages"]]
        request = prompter.chat(messages, options, tools or None)
        calls = _forced_calls(tools or [], given.get("tool_choice", "auto"))
        requests = (dataclasses.replace(request, calls=calls),)
    else:
        requests = tuple(_plain(prompt, prompter, options) for prompt in _prompts(given["prompt"]))
        if len(requests) * options.n > MOST:
            raise UserError(f"the prompts and their n are {len(requests) * options.n} texts: send {MOST} at most")
    usage = bool(given.get("stream_options", {}).get("include_usage"))
    return Asked(requests, chat, bool(tools), given.get("stream", False), usage)


# Fields of which the type is looked at here; of the others `Options.changed` does.
_TYPES: dict[str, type] = {
    "model": str,
    "messages": list,
    "tools": list,
    "stream": bool,
    "stream_options": dict,
    "response_format": dict,
    "chat_template_kwargs": dict,
    "max_completion_tokens": int,
    "top_logprobs": int,
    "seed": int,
    "n": int,
}


def _check(given: Mapping[str, Any], chat: bool) -> None:
    """Raises `UserError` for a field that is unknown, of a wrong type or not done here."""
    for key, value in given.items():
        if key not in _KNOWN:
            raise UserError(f"{key} is not known here: drop it")
        if value not in NEUTRAL.get(key, (value,)):
            raise UserError(f"{key} = {json.dumps(value)[:60]} is not done here: drop it")
        kind = _TYPES.get(key, object)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{key} must be of type {kind.__name__}, not {type(value).__name__}")
    if given.get("n", 1) > MOST:
        raise UserError(f"n must be at most {MOST}, not {reprlib.repr(given['n'])}")
    if isinstance(given.get("stop"), list) and len(given["stop"]) > MOST_STOPS:
        raise UserError(f"stop must be at most {MOST_STOPS} strings, not {len(given['stop'])}")
    _check_template(given)
    if chat and not isinstance(given.get("logprobs", False), bool):
        raise UserError("logprobs must be true or false; how many of the likeliest tokens top_logprobs says")
    if given.get("top_logprobs") and not (chat and given.get("logprobs")):
        raise UserError("top_logprobs goes with messages and logprobs = true")
    if not 0 <= given.get("top_logprobs", 0) <= ALTERNATIVES:
        raise UserError(f"top_logprobs must be from 0 to {ALTERNATIVES}, not {given['top_logprobs']}")
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if wanted not in given or other in given:
        raise UserError(f"give {wanted}, which this address takes, and not {other}")
    for key in () if chat else ("tools", "tool_choice", "chat_template_kwargs"):
        if key in given:
            raise UserError(f"{key} goes with messages, not with a prompt: drop it")
    if not all(isinstance(message, dict) for message in given.get("messages", ())):
        raise UserError("messages must be a list of objects with role and content")


def _check_template(given: Mapping[str, Any]) -> None:
    """The same of what the chat template is to be told."""
    for key, value in given.get("chat_template_kwargs", {}).items():
        if key != "enable_thinking" or not isinstance(value, bool):
            raise UserError(f"chat_template_kwargs: {key} = {json.dumps(value)[:60]} is not known here: drop it")
        if not value and "thinking_budget" in given:
            raise UserError("thinking_budget and enable_thinking = false contradict each other: drop one")


def _schema(form: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema that `response_format` holds the reply to; None for any text."""
    match form:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    raise UserError(
        f"response_format = {json.dumps(form)[:60]} is not known here: its type is text, json_object, or json_schema "
        "with json_schema.schema"
    )


def _forced_calls(tools: Sequence[Any], choice: Any) -> Tools:
    """The tools of which `tool_choice` asks for calls; none if the model may say something else."""
    match choice:
        case "auto" | "none":
            return ()
        case "required":
            wanted = None
        case {"type": "function", "function": {"name": str(wanted)}}:
            pass
        case _:
            raise UserError(
                f"tool_choice = {json.dumps(choice)[:60]} is not known here: it is none, auto, required, or "
                '{"type": "function", "function": {"name": …}}'
            )
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    functions = [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]
    calls = tuple(
        (one["name"], as_json(_parameters(one), "tools")) for one in functions if wanted in (None, one["name"])
    )
    if not calls:
        raise UserError(
            f"tool_choice = {json.dumps(choice)[:60]} wants a tool that is not among tools: name one of them"
        )
    return calls


def _parameters(function: Mapping[str, Any]) -> Any:
    """The JSON Schema of a function's arguments."""
    parameters = function.get("parameters")
    return {"type": "object"} if parameters in (None, {}) else parameters


def _prompts(prompt: Any) -> list[Any]:
    """One or several: texts, or lists of tokens."""
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]


def _plain(prompt: Any, prompter: Prompter, options: Options) -> Request:
    """The request for a text, or tokens, to go on from."""
    if isinstance(prompt, str):
        return prompter.plain(prompt, options)
    size = prompter.tokenizer.size
    if not isinstance(prompt, list) or not all(type(t) is int and 0 <= t < size for t in prompt):
        raise UserError(f"prompt must be a text, or a list of tokens from 0 to {size - 1}")
    return options.request(prompt, ends_inside_thinking(prompter.tokenizer.decode(prompt[-len(OPEN) :], keep=None)))


class Answer:
    """An answer in the making: the same whether sent as a whole or in pieces.

    Args:
      asked: what was asked for.
      model: the name of the model.
    """

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._object, prefix = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._piece_head = {**self._head, "object": f"{self._object}.chunk" if asked.chat else self._object}
        self._index = {text: k for k, text in enumerate(asked.texts())}
        self._texts = [_Text(asked) for _ in self._index]
        self._replies: dict[int, Reply] = {}
        self._told = [_Logprobs(asked.chat) for _ in self._texts]

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return len(self._replies) == len(self._texts)

    def push(self, reply: Reply, segments: Iterable[Segment], request: int = 0) -> list[dict[str, Any]]:
        """Takes what is new in a text of a request; returns the pieces to be sent in a stream."""
        k = self._index[request, reply.sample]
        text = self._texts[k]
        deltas = [delta for segment in segments for delta in text.feed(segment)]
        if reply.finish is not None:
            self._replies[k] = reply
            deltas += text.end(reply.finish in ("length", "context"))
        if self._asked.chat and text.first:
            deltas.insert(0, {"role": "assistant", "content": ""})
            text.first = False
        pieces = [self._piece(k, delta, None) for delta in deltas]
        if reply.finish is not None:
            pieces.append(self._piece(k, {} if self._asked.chat else {"text": ""}, self._finish(k)))
        # Of tokens that gave no piece it is told with the next; to who wants no pieces with all at the end.
        if pieces and self._asked.stream and self._asked.request.logprobs is not None:
            pieces[-1]["choices"][0]["logprobs"] = self._told[k].take(reply)
        return pieces

    def _piece(self, k: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        inside = {"delta": delta} if self._asked.chat else delta
        return {**self._piece_head, "choices": [{"index": k, **inside, "finish_reason": finish}]}

    def usage_piece(self) -> dict[str, Any]:
        """The piece that tells how many tokens there were, after all others."""
        return {**self._piece_head, "choices": [], "usage": self.usage}

    @property
    def whole(self) -> dict[str, Any]:
        """The answer as a whole, when all texts have ended."""
        choices = [{"index": k, **text.whole, "finish_reason": self._finish(k)} for k, text in enumerate(self._texts)]
        if self._asked.request.logprobs is not None:
            for k, choice in enumerate(choices):
                choice["logprobs"] = _Logprobs(self._asked.chat).take(self._replies[k])
        return {**self._head, "object": self._object, "choices": choices, "usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens there were, and how many had been read before; a prompt counts once for all its texts."""
        prompt = sum(len(request.tokens) for request in self._asked.requests)
        written = sum(len(reply.tokens) for reply in self._replies.values())
        first = (self._replies[k] for k, (_, sample) in enumerate(self._asked.texts()) if sample == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in first)},
        }

    def _finish(self, k: int) -> str:
        reason = self._replies[k].finish or "interrupted"
        return "tool_calls" if self._texts[k].calls else FINISH.get(reason, reason)


class _Text:
    """One text of an answer, as a chat's message or plain."""

    def __init__(self, asked: Asked) -> None:
        self.first = True
        self.calls: list[dict[str, Any]] = []
        self._chat = asked.chat
        self._thinking, self._content = _Trimmed(OPEN, CLOSE), _Trimmed("", "", "\n")
        self._before_calls = StopFilter((CALLS,) if asked.tools else ())
        self._answer = ""  # the text after thinking, as generated
        self._sent: dict[str, list[str]] = {}

    def feed(self, segment: Segment) -> Sequence[dict[str, Any]]:
        """What is new in the message."""
        if not self._chat:
            return self._out("text", segment.text)
        if segment.thinking:
            return self._out("reasoning_content", self._thinking.feed(segment.text))
        self._answer += segment.text
        return self._out("content", self._content.feed(self._before_calls.feed(segment.text)))

    def end(self, cut_off: bool) -> Sequence[dict[str, Any]]:
        """What was held back; the calls of a text that was cut off may not be all, and are text."""
        if not self._before_calls.stopped:
            return self._out("content", self._content.feed(self._before_calls.flush()))
        _, tag, rest = self._answer.partition(CALLS)
        calls = None if cut_off else _calls(rest)
        if calls is None:  # then it is text
            return self._out("content", self._content.feed(tag + rest))
        self.calls = calls
        return [{"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}]

    def _out(self, field: str, text: str) -> Sequence[dict[str, Any]]:
        if not text:
            return ()
        self._sent.setdefault(field, []).append(text)
        return ({field: text},)

    @property
    def whole(self) -> dict[str, Any]:
        """The message, or the text."""
        joined = {field: "".join(pieces) for field, pieces in self._sent.items()}
        if not self._chat:
            return {"text": joined.get("text", "")}
        content = joined.get("content", None if self.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if "reasoning_content" in joined:
            message["reasoning_content"] = joined["reasoning_content"]
        if self.calls:
            message["tool_calls"] = self.calls
        return {"message": message}


class _Logprobs:
    """What is told of a text's tokens, as a chat's or as plain text's."""

    def __init__(self, chat: bool) -> None:
        self._chat, self._given, self._offset = chat, 0, 0

    def take(self, reply: Reply) -> dict[str, Any]:
        """Of the tokens that were not told yet."""
        new, text_of = reply.logprobs[self._given :], reply.tokenizer.text_of
        self._given += len(new)
        if self._chat:
            content = [self._named(reply, told.token, told.logprob) for told in new]
            for one, told in zip(content, new, strict=True):
                one["top_logprobs"] = [self._named(reply, *best) for best in told.best]
            return {"content": content, "refusal": None}
        offsets = []
        for told in new:
            offsets.append(self._offset)
            self._offset += len(text_of(told.token))
        return {
            "tokens": [text_of(told.token) for told in new],
            "token_logprobs": [told.logprob for told in new],
            # Of tokens with the same text the likeliest.
            "top_logprobs": [{text_of(token): logprob for token, logprob in reversed(told.best)} for told in new],
            "text_offset": offsets,
        }

    @staticmethod
    def _named(reply: Reply, token: int, logprob: float) -> dict[str, Any]:
        written = reply.tokenizer.bytes_of(token)
        return {"token": reply.tokenizer.text_of(token), "logprob": logprob, "bytes": list(written)}


class _Trimmed:
    """Streamed text without its tags, without what is to be stripped before it and, with a tag at its end, after it."""

    def __init__(self, opened: str, closed: str, stripped: str | None = None) -> None:
        self._opened, self._closed, self._stripped = opened, closed, stripped
        self._begun, self._held = False, ""

    def feed(self, text: str) -> str:
        """The text that is certain now."""
        if not self._begun:
            text = text.lstrip(self._stripped)
            if self._opened and text.startswith(self._opened):
                self._opened, text = "", text[len(self._opened) :].lstrip(self._stripped)
            self._begun = bool(text)
        if not self._closed:
            return text
        text = self._held + text.removesuffix(self._closed)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept


def _calls(text: str) -> list[dict[str, Any]] | None:
    """The tool calls in what follows `<tool_calls>`, JSON objects one after the other; None if they are none."""
    found, text = [], text.lstrip()
    while text and not text.startswith(CALLS_END):
        try:
            call, end = json.JSONDecoder().raw_decode(text)
            name, arguments = call["name"], call.get("arguments")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        written = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
        function = {"name": name, "arguments": written}
        found.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        text = text[end:].lstrip()
    return found or None
