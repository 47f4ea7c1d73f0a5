"""Conversations to prompt text, by the chat template that comes with a model.

Templates are Jinja programs, rendered in a sandbox with the conventions of Hugging Face's `apply_chat_template`. First
messages are brought into the form that the template reads: M1's wants `content` as a list of parts and never shows an
assistant's tool calls nor its reasoning, which belongs to its words as it generated them.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from m1jax.errors import UserError
from m1jax.reply import CLOSE, OPEN

Message = Mapping[str, Any]

ONLY = ""  # stands for the id of a call that is the only one of its message
ROLES = ("system", "user", "assistant", "tool")
_PROBE = "\N{SYMBOL FOR ENQUIRY}probe"


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: the Jinja source.
      special: special tokens by role, which templates read as variables (`bos_token`, …).

    Raises:
      UserError: the source is not a Jinja template.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._special = dict(special or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not valid ({error}): copy the tokenizer files again") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a conversation.

        Args:
          messages: each with a `role` (system, user, assistant, tool) and `content`, a string or a list of text parts;
            an assistant's may have `tool_calls`, and `reasoning_content` or `reasoning`, which comes before its content
            in the tags that M1 thinks in.
          tools: functions on offer, as `{"name", "description", "parameters"}` or wrapped as `{"function": …}`.
          add_generation_prompt: whether to open the assistant's turn at the end.

        Raises:
          UserError: a message is malformed, or the template refuses the conversation.
        """
        if not messages:
            raise UserError("the conversation is empty: give at least one message")
        names: dict[str, str] = {}
        try:
            return self._render(
                [self._message(message, names) for message in messages],
                tools=[self._tool(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
            )
        except UserError:
            raise
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the chat template fails on the conversation: {error}") from None

    def _render(self, messages: Sequence[Message], **variables: Any) -> str:
        return self._template.render(
            messages=messages, **self._special, **{"tools": None, "documents": None} | variables
        )

    def _message(self, message: Message, names: dict[str, str]) -> dict[str, Any]:
        """The message as this template reads it; `names` remembers the function name of each tool call's id."""
        message = _with_reasoning(message)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message role {role!r} is unknown: use one of {', '.join(ROLES)}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or (calls and role != "assistant"):
            raise UserError("tool_calls must be a list in an assistant's message")
        out = dict(message)
        if role == "tool":
            parts = _tool_results(message, names)
            if self._reads_parts and not all(part["name"] for part in parts):
                raise UserError("a tool's message names no function: give name, or tool_call_id of the call it answers")
            out["content"] = parts if self._reads_parts else "".join(part["text"] for part in parts)
            return out
        text = _text(content) if content is not None or not calls else ""
        if calls:
            out["tool_calls"] = [_call(call, names) for call in calls]
            names[ONLY] = out["tool_calls"][0]["function"]["name"] if len(calls) == 1 else ""
            if not self._reads_tool_calls:
                text = text + ("\n" if text and not text.endswith("\n") else "") + _tool_calls(out.pop("tool_calls"))
        out["content"] = [{"type": "text", "text": text}] if self._reads_parts else text
        return out

    def _tool(self, tool: Any) -> Mapping[str, Any]:
        """A tool as the bare function that M1 was shown, unless the template unwraps it itself."""
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tool {json.dumps(tool)[:60]} has no name")
        wrapped = re.search(r"tool(\.|\[['\"])function", self._source)
        return {"type": "function", "function": function} if wrapped else function

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """Whether `content` must be a list of parts: found out by trying, as the source may say it in many ways."""
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        except Exception:  # whatever a foreign template may raise, it does not read this form
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    @functools.cached_property
    def _reads_tool_calls(self) -> bool:
        """Whether the template shows `tool_calls` itself."""
        content = [{"type": "text", "text": "."}] if self._reads_parts else "."
        function = {"name": _PROBE, "arguments": {}}
        call = {"id": "0", "type": "function", "function": function, **function}
        user = {"role": "user", "content": content}
        try:
            return _PROBE in self._render([user, {"role": "assistant", "content": content, "tool_calls": [call]}, user])
        except Exception:  # as above
            return False


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own `tojson` escapes for HTML, which a model was never shown."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _text(content: Any) -> str:
    """The text of `content`; templates differ in how many parts they read, so parts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"message content must be a string or a list of text parts, not {type(content).__name__}")
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise UserError(
                f"message content has a part that is not text ({json.dumps(part)[:60]}): this model reads text only"
            )
    return "".join(part["text"] for part in content)


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning at the head of its content, and nowhere else."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if message.get("role") != "assistant" or not reasoning:
        return message
    if not isinstance(reasoning, str):
        raise UserError("reasoning_content is not a string")
    thought, content = f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n", message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    rest = {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning")}
    return {**rest, "content": [{"type": "text", "text": thought}, *parts]}


def _tool_results(message: Message, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A tool message's results, each with the name of the function it came from."""
    content, call = message.get("content"), message.get("tool_call_id")
    name = message.get("name") or names.get(ONLY if call is None else str(call), "")
    parts = content if isinstance(content, list) else [{"text": _text(content)}]
    results = [
        {"type": "text", "text": _text([part]), "name": part.get("name") or name if isinstance(part, Mapping) else name}
        for part in parts
    ]
    if call is not None and not all(result["name"] for result in results):
        raise UserError(f"tool_call_id {call!r} is not of a tool call before it: correct it, or give a name")
    return results


def _call(call: Any, names: dict[str, str]) -> dict[str, Any]:
    """A tool call in the form `{"id", "type", "function": {"name", "arguments"}}` with `arguments` as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"tool call {json.dumps(call)[:60]} has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UserError(f"arguments of the tool call {function['name']!r} are not valid JSON") from None
    if "id" in call:
        names[str(call["id"])] = function["name"]
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls as M1 writes them itself."""
    lines = [_tojson({key: call["function"][key] for key in ("name", "arguments")}) for call in calls]
    return "\n".join(["<tool_calls>", *lines, "</tool_calls>"])
