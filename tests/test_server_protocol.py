"""What the server reads and writes: OpenAI's bodies to requests, replies to answers and their pieces."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1jax import UserError
from m1jax.prompt import Options, Prompter
from m1jax.reply import Phase, Request, ThinkingSplitter
from m1jax.sampling import MAX_SEED, Sampling
from m1jax.server import protocol
from m1jax.server.protocol import Answer, Asked
from m1jax.tokenizer import Tokenizer
from tests.generation_fixtures import CONTEXT, small_tokenizer

OPTIONS = Options(max_tokens=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def form(schema: Any) -> dict[str, Any]:
    """As OpenAI's clients ask for it."""
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    """The `tool_choice` for one tool."""
    return {"type": "function", "function": {"name": name}}


def read(tokenizer: Tokenizer, body: Any, chat: bool = True) -> Asked:
    return protocol.read(body, chat, Prompter(tokenizer), OPTIONS)


def test_a_body_with_everything(tokenizer: Tokenizer) -> None:
    body = {
        "model": "m1", "messages": USER, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 4, "n": 2,
        "repetition_penalty": 1.1, "max_completion_tokens": 9, "stop": "end", "thinking_budget": 3, "tools": TOOLS,
        "stream": True, "stream_options": {"include_usage": True}, "user": "me", "logprobs": False, "logit_bias": {},
        "response_format": {"type": "text"}, "frequency_penalty": 0.0, "tool_choice": "auto",
    }  # fmt: skip
    asked = read(tokenizer, body)
    sampling = Sampling(0.5, 3, 0.9, 0.1, 1.1)
    options = Options(sampling, seed=4, n=2, max_tokens=9, stop=("end",), thinking_budget=3)
    assert asked == Asked((Prompter(tokenizer).chat(USER, options, TOOLS),), True, True, True, True)
    asked = read(tokenizer, dict.fromkeys(body) | {"messages": USER})
    assert (asked.tools, asked.stream, asked.usage) == (False, False, False)
    assert asked.request.max_tokens == CONTEXT and asked.request.sampling == OPTIONS.sampling
    assert asked.request.seed != read(tokenizer, {"messages": USER}).request.seed
    no_tools = read(tokenizer, {"messages": USER, "tools": TOOLS, "tool_choice": "none"})
    assert not no_tools.tools and no_tools.request.tokens == asked.request.tokens
    other = {"top_k": -1, "seed": -1, "reasoning_effort": None, "function_call": None}
    asked = read(tokenizer, other | {"messages": [{"role": "developer", "content": "be brief"}, *USER]}).request
    system = [{"role": "system", "content": "be brief"}, *USER]
    assert asked == dataclasses.replace(read(tokenizer, {"messages": system}).request, seed=MAX_SEED)
    schema = {"type": "integer"}
    held = {"response_format": form(schema), "tools": TOOLS, "tool_choice": "none"}
    assert json.loads(read(tokenizer, {"messages": USER, **held}).request.json_schema or "") == schema
    held = {"response_format": {"type": "json_object"}}
    assert read(tokenizer, {"prompt": "hi", **held}, False).request.json_schema == '{"type": "object"}'
    tools = [*TOOLS, tool("time", {"type": "object", "properties": {"zone": {"type": "string"}}})]
    calls = read(tokenizer, {"messages": USER, "tools": tools, "tool_choice": "required"}).request.calls
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("weather", {"type": "object"}),
        ("time", tools[1]["function"]["parameters"]),
    ]
    one = read(tokenizer, {"messages": USER, "tools": tools, "tool_choice": named("time")}).request
    assert one.calls == calls[1:] and not read(tokenizer, {"messages": USER, "tools": tools}).request.calls
    quick = read(tokenizer, {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}})
    assert not quick.request.may_think and len(quick.request.tokens) > len(no_tools.request.tokens)


def test_texts_and_tokens_to_go_on_from(tokenizer: Tokenizer) -> None:
    text = "The quick <think>"
    tokens = tokenizer.encode(text)
    for prompt in (text, [text], tokens, [tokens]):
        asked = read(tokenizer, {"prompt": prompt}, chat=False)
        assert list(asked.request.tokens) == list(tokens) and not asked.chat and asked.request.max_tokens == 16
    asked = read(tokenizer, {"prompt": [text, tokens, "a"], "n": 2, "seed": 3}, chat=False)
    first, second, third = asked.requests
    assert first == second and third.tokens == tuple(tokenizer.encode("a")) and first.thinking
    assert asked.texts() == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ([1], "not a JSON object"),
        ({}, "give messages"),
        ({"messages": USER, "prompt": "x"}, "not prompt"),
        ({"messages": "hi"}, "messages must be of type list, not str"),
        ({"messages": ["hi"]}, "list of objects"),
        ({"messages": []}, "empty"),
        ({"messages": USER, "model": 2}, "model must be of type str"),
        ({"messages": USER, "reasoning_effort": "high"}, "reasoning_effort is not known here"),
        ({"messages": USER, "temprature": 1}, "temprature is not known here"),
        ({"messages": USER, "raw": True}, "raw is not known here"),
        ({"messages": USER, "logprobs": 3}, "logprobs must be true or false"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs must be from 0 to 20, not 21"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs goes with messages and logprobs = true"),
        ({"messages": USER, "echo": True}, "echo = true is not done here"),
        ({"messages": USER, "response_format": "json"}, "response_format must be of type dict, not str"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format = .* is not known here"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format = .* is not known here"),
        ({"messages": USER, "response_format": form({"type": "nothing"})}, "Invalid type: nothing"),
        ({"messages": USER, "response_format": form({}), "tools": TOOLS}, "response_format and tools contradict"),
        ({"messages": USER, "tool_choice": "required"}, "wants a tool that is not among tools"),
        ({"messages": USER, "tools": TOOLS, "tool_choice": named("time")}, "wants a tool that is not among tools"),
        ({"messages": USER, "tools": TOOLS, "tool_choice": "always"}, 'tool_choice = "always" is not known here'),
        (
            {"messages": USER, "tools": [tool("f", {"not": {}})], "tool_choice": "required"},
            'the tool "f" cannot be followed',
        ),
        ({"messages": USER, "tools": [{"type": "function"}]}, "has no name"),
        ({"messages": USER, "n": 129}, "n must be at most 128"),
        ({"messages": USER, "n": True}, "n must be of type int"),
        ({"messages": USER, "max_completion_tokens": 0}, "max-tokens must be 1 or more"),
        ({"messages": USER, "temperature": float("nan")}, "temperature"),
        ({"messages": USER, "stop": ["a", 1]}, "stop"),
        ({"messages": USER, "stop": ["a"] * 65}, "stop must be at most 64 strings, not 65"),
        ({"messages": USER, "n": 10**30}, "n must be at most 128, not 1000"),
        ({"messages": USER, "stream": "yes"}, "stream must be of type bool"),
        ({"messages": USER, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: x = 1 is not known"),
        ({"messages": USER, "chat_template_kwargs": {"enable_thinking": "false"}}, 'enable_thinking = "false" is not'),
        (
            {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 3},
            "thinking_budget and enable_thinking = false contradict each other",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 90_000}]}]}, "valid JSON"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "UTF-8"),
    ],
)
def test_bodies_that_are_refused(tokenizer: Tokenizer, body: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read(tokenizer, body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"messages": USER}, "give prompt"),
        ({"prompt": "x", "tools": TOOLS}, "tools goes with messages"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"prompt": ["a", 3]}, "a text, or a list of tokens"),
        ({"prompt": [[1], [400]]}, "a text, or a list of tokens from 0 to 399"),
        ({"prompt": ["a"] * 33, "n": 4}, "the prompts and their n are 132 texts: send 128 at most"),
        ({"prompt": [1, 400]}, "a text, or a list of tokens from 0 to 399"),
        ({"prompt": [True]}, "a text, or a list of tokens"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "x", "logprobs": True}, "logprobs must be of type int"),
        ({"prompt": "x", "logprobs": 21}, "logprobs must be from 0 to 20, not 21"),
    ],
)
def test_prompts_that_are_refused(tokenizer: Tokenizer, body: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read(tokenizer, body, chat=False)


class Written:
    """A reply that is already written, as far as an answer looks at it."""

    sample, tokens, cached_tokens = 0, (1, 2, 3), 0

    def __init__(self, finish: str | None) -> None:
        self.finish = finish


def answered(
    text: str, cuts: list[int], tools: bool, chat: bool = True, finish: str = "eos"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer of a model that writes `text`, cut into pieces, as a whole and put together from a stream."""
    answer = Answer(Asked((Request((1, 2, 3)),), chat, tools, True, True), "m1")
    splitter, pieces, places = ThinkingSplitter(Phase.START), [], sorted({0, *(c % (len(text) + 1) for c in cuts)})
    for begin, end in zip(places, [*places[1:], len(text)], strict=True):
        pieces += answer.push(Written(None), splitter.feed(text[begin:end]))  # pyright: ignore[reportArgumentType]
    assert not answer.done
    pieces += answer.push(Written(finish), splitter.flush())  # pyright: ignore[reportArgumentType]
    assert answer.done
    (whole,) = answer.whole["choices"]
    streamed: dict[str, Any] = {"finish_reason": pieces[-1]["choices"][0]["finish_reason"], "index": 0}
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces[:-1])
    if not chat:
        return whole, streamed | {"text": "".join(piece["choices"][0]["text"] for piece in pieces)}
    message: dict[str, Any] = {}
    for piece in pieces:
        for field, value in piece["choices"][0]["delta"].items():
            if field == "tool_calls":
                message[field] = [{key: v for key, v in call.items() if key != "index"} for call in value]
            else:
                message[field] = message.get(field, "") + value
    if "content" not in whole["message"] or whole["message"]["content"] is None:
        assert message["content"] == ""
        message["content"] = None
    return whole, streamed | {"message": message}


CALLED = '<tool_calls>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n{"name": "time"}\n</tool_calls>'


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["", "<think>\nOkay.\n</think>\n\n", "<think></think>", "<think> a <tool_calls> b", "\n<think>x"]),
    st.sampled_from(["85", " 85\n", "a < b <tool", "Let me see.\n" + CALLED, CALLED, "<tool_calls>\n{oops}"]),
    st.lists(st.integers(0, 200), max_size=12),
    st.booleans(),
)
def test_a_stream_is_the_whole_however_it_is_cut(thinking: str, text: str, cuts: list[int], tools: bool) -> None:
    whole, streamed = answered(thinking + text, cuts, tools)
    assert streamed == whole
    message, uncut = whole["message"], answered(thinking + text, [], tools)[0]["message"]
    for fields in (message, uncut):  # the ids of calls are random
        fields["tool_calls"] = [call["function"] for call in fields.get("tool_calls", ())]
    assert message == uncut
    closed = not thinking or "</think>" in thinking
    if closed and not (tools and CALLED in text):
        assert message["content"] == text.lstrip("\n") and not message["tool_calls"]


def test_thinking_and_tool_calls_have_their_places() -> None:
    whole, _ = answered("<think>\nWhere?\n</think>\nLet me see.\n" + CALLED, [3, 30, 60], True)
    message = whole["message"]
    assert (message["reasoning_content"], message["content"]) == ("Where?", "Let me see.\n")
    assert whole["finish_reason"] == "tool_calls"
    functions = [call["function"] for call in message["tool_calls"]]
    called = [(function["name"], json.loads(function["arguments"])) for function in functions]
    assert called == [("weather", {"city": "Zürich"}), ("time", {})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    forced, _ = answered(CALLED, [], True, finish="complete")
    assert forced["finish_reason"] == "tool_calls" and len(forced["message"]["tool_calls"]) == 2
    cut_off, _ = answered(CALLED.partition("\n{")[0], [], True, finish="length")
    assert cut_off["finish_reason"] == "length" and "tool_calls" not in cut_off["message"]
    plain = "<think>x</think> y"
    assert [choice["text"] for choice in answered(plain, [4], False, chat=False)] == [plain] * 2


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (
            '{"name": "f", "arguments": {"a": "one\u2028two </tool_calls> three"}}',
            {"a": "one\u2028two </tool_calls> three"},
        ),
        ('\n\n{"name": "f",\n "arguments": {"a": 1}}\n\n', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": {"a": "\\ud83d"}}', {"a": "\ud83d"}),
    ],
)
def test_calls_as_models_write_them(written: str, arguments: Any) -> None:
    for tail in ("\n</tool_calls>", "</tool_calls> and more", ""):
        calls = protocol._calls("\n" + written + tail)
        assert calls and [call["function"]["name"] for call in calls] == ["f"]
        assert json.loads(calls[0]["function"]["arguments"]) == arguments
        json.dumps(calls).encode()
