"""Answers held to a JSON Schema: whatever a model would like to say."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from m1jax import UserError
from m1jax.chat import Chat
from m1jax.engine import Engine
from m1jax.generate import main
from m1jax.grammar import CALLS, CALLS_END, Grammars, Matcher
from m1jax.jsonl import Line
from m1jax.prompt import Options, Prompter
from m1jax.reply import CLOSE, OPEN, Reply, Request
from m1jax.sampling import Sampling, only
from m1jax.server import protocol
from m1jax.tokenizer import Tokenizer
from tests.generation_fixtures import one, random_engine, replies

WILD = Sampling(temperature=3.0, top_p=1.0)
PLACE = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}, "required": ["x", "y"]}
# Bounded: a random model would fill a list or a string for ever.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["ünï", "b", 3, None]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "places"],
    "additionalProperties": False,
    "$defs": {
        "place": PLACE
        | {"properties": {"x": {"enum": [1, 22]}, "y": {"enum": [-0.5, 7]}}, "additionalProperties": False}
    },
}


def check(value: Any) -> None:
    """That it is what `SCHEMA` says."""
    assert set(value) == {"name", "kind", "places"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 6
    assert value["kind"] in ("ünï", "b", 3, None)
    assert 1 <= len(value["places"]) <= 2
    assert all(
        set(place) == {"x", "y"} and place["x"] in (1, 22) and place["y"] in (-0.5, 7) for place in value["places"]
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One engine for all tests, so that each shape is compiled once."""
    return random_engine(tmp_path_factory.mktemp("tokenizer"))


def asked(engine: Engine, seed: int, **options: Any) -> Request:
    tokens = tuple(engine.tokenizer.encode(f"The quick brown fox {seed}"))
    defaults: dict[str, Any] = {
        "sampling": WILD,
        "max_tokens": 200,
        "may_think": False,
        "json_schema": json.dumps(SCHEMA),
    }
    return Request(tokens, seed=seed, **defaults | options)


def test_every_answer_is_of_the_schema(engine: Engine) -> None:
    """From a random model at a high temperature, beside texts that may say anything, which stay as they are."""
    free = [asked(engine, seed, json_schema=None, max_tokens=30) for seed in range(2)]
    greedy = asked(engine, 9, sampling=Sampling(temperature=0, repetition_penalty=1.3))
    requests = [*free, *(asked(engine, seed, n=2, logprobs=seed % 2) for seed in range(4)), greedy]
    out = replies(engine, requests, max_rows=4)
    for (index, sample), reply in out.items():
        if index < len(free):
            assert reply.tokens == one(engine, requests[index]).tokens
            continue
        check(json.loads(reply.answer))
        assert reply.finish == "complete"
        assert sample or reply.tokens == replies(engine, [requests[index]])[0, 0].tokens
    assert len({reply.answer for reply in out.values()}) == len(out)


def test_thinking_is_free_and_the_answer_is_not(engine: Engine) -> None:
    """A budget ends thinking; `<think>` of the prompt, of the model, or none."""
    inside = asked(engine, 0, thinking=True, may_think=True, thinking_budget=9)
    reply = one(engine, inside)
    assert reply.thinking
    check(json.loads(reply.answer))
    for seed in range(3):
        reply = one(engine, asked(engine, seed, may_think=True, thinking_budget=5))
        assert reply.text.lstrip().startswith((OPEN, "{"))
        check(json.loads(reply.answer))


def test_every_call_is_of_its_tool(engine: Engine) -> None:
    """Of one tool or several, one call or more, with a schema that refers to its own definitions."""
    day = {"type": "object", "properties": {"day": {"$ref": "#/$defs/day"}}, "required": ["day"]}
    day |= {"additionalProperties": False, "$defs": {"day": {"enum": [1, 2]}}}
    place = {"type": "object", "properties": {"é": {"const": "x"}}, "required": ["é"], "additionalProperties": False}
    tools = ("weather", json.dumps(day)), ('a "b"', json.dumps(place))
    called = set[str]()
    for seed in range(4):
        reply = one(engine, asked(engine, seed, json_schema=None, calls=tools))
        calls = protocol._calls(reply.answer.partition(CALLS)[2])
        assert not reply.answer.partition(CALLS)[0].strip()
        if reply.finish == "complete":
            assert calls and reply.answer.endswith(CALLS_END)
        for call in calls or []:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert arguments in ([{"day": 1}, {"day": 2}] if name == "weather" else [{"é": "x"}])
            called.add(name)
    assert called == {"weather", 'a "b"'}


def test_a_text_that_is_cut_off_or_stopped(engine: Engine) -> None:
    assert one(engine, asked(engine, 1, max_tokens=4)).finish == "length"
    stopped = one(engine, asked(engine, 1, stop=('"kind"',)))
    assert stopped.finish == "stop" and stopped.answer.lstrip(" \n\t{").startswith('"name"')


def test_a_conversation_keeps_whole_answers(engine: Engine) -> None:
    """What ends an answer is its last brace, not a token to be left out of the conversation."""
    chat = Chat(engine, Options(Sampling(temperature=0), json_schema='{"enum": [{"a": 1}, "b"]}', no_thinking=True))
    for message in ("Hi", "fox?"):
        before = list(chat.tokens)
        reply = list(chat.send(message))[-1].reply
        assert chat.tokens[: len(before)] == before
        assert json.loads(reply.answer) in ({"a": 1}, "b") and reply.finish == "complete"
        assert chat._messages[-1]["content"].endswith(reply.answer)


def test_only_allowed_tokens_are_left() -> None:
    rng = np.random.default_rng(0)
    logits, bits = rng.standard_normal((3, 70), np.float32), rng.integers(0, 2, (3, 96)).astype(bool)
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    np.testing.assert_array_equal(jax.jit(only)(logits, words), np.where(bits[:, :70], logits, -np.inf))


def test_tags_that_are_tokens(engine: Engine) -> None:
    """A tokenizer with `<think>` among its special tokens."""
    backend = tokenizers.Tokenizer.from_str(engine.tokenizer.json)
    backend.add_special_tokens([OPEN, CLOSE])
    tokenizer = Tokenizer(backend, engine.tokenizer.folder, {}, None, engine.eos_ids)
    matcher = Grammars(tokenizer, {3}, 416).matcher(Request((1,), json_schema='{"type": "integer"}'))
    assert matcher is not None
    tokens = tokenizer.encode(f"{OPEN}\nany 7 {{ text\n{CLOSE}\n42")
    assert {tokenizer.id_of(OPEN), tokenizer.id_of(CLOSE)} < set(tokens)
    for token in tokens:
        assert matcher.allowed()[token // 32] >> token % 32 & 1
        matcher.push(token)
    allowed = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little").nonzero()[0].tolist()
    assert {token for token in allowed if not (tokenizer.name_of(token) or "").isdigit()} == {3}


def test_a_tag_spelled_out_does_not_end_thinking_unseen(engine: Engine) -> None:
    """Where the tags are tokens: what the reader takes for the end of thinking is that for the grammar, or masked."""
    backend = tokenizers.Tokenizer.from_str(engine.tokenizer.json)
    spelled = [*engine.tokenizer.encode("<"), *engine.tokenizer.encode("/think"), *engine.tokenizer.encode(">")]
    backend.add_special_tokens([OPEN, CLOSE])
    tokenizer = Tokenizer(backend, engine.tokenizer.folder, {}, None, engine.eos_ids)
    matcher = Grammars(tokenizer, {3}, 416).matcher(Request((1,), json_schema="{}", thinking=True))
    assert matcher is not None
    for token in spelled[:-1]:
        matcher.push(token)
    assert not matcher.failed and not matcher.allowed()[spelled[-1] // 32] >> spelled[-1] % 32 & 1


def test_a_budget_waits_for_the_end_of_a_character(engine: Engine) -> None:
    request = Request((1,), json_schema='{"type": "object"}', thinking=True, thinking_budget=1)
    grammars = Grammars(engine.tokenizer, engine.eos_ids, 416)
    reply = Reply(request, 0, engine.tokenizer, engine.eos_ids, 999, grammars.matcher(request))
    (first, *rest) = engine.tokenizer.encode("\N{SNOWMAN}")
    assert rest
    reply.push(first)
    assert reply.take_forced() is None
    for token in rest:
        reply.push(token)
    while (forced := reply.take_forced()) is not None:
        reply.push(forced)
    assert reply.finish is None and reply.thinking == "\N{SNOWMAN}"


def test_the_bound_on_white_space_is_not_the_schemas(engine: Engine) -> None:
    request = Request((1,), json_schema='{"type": "object", "x-guidance": {"lenient": true}}')
    matcher = Grammars(engine.tokenizer, engine.eos_ids, 416).matcher(request)
    assert matcher is not None
    for token in engine.tokenizer.encode("{  \n"):
        matcher.push(token)
    assert matcher.failed


def test_a_form_that_only_the_tokens_show_to_be_empty(engine: Engine) -> None:
    """It passes the check of the grammar, and no token may come."""
    try:
        reply = one(engine, asked(engine, 0, json_schema='{"$ref": "#"}'))
    except UserError as error:
        assert "cannot be followed" in str(error)
    else:
        assert reply.finish == "length" and not reply.answer.strip()


def test_tools_with_odd_names(engine: Engine) -> None:
    for name in ("a\nb", "\\", "{}", "/x/", "", "\u2028", "\N{SNOWMAN}"):
        request = Request((1,), calls=((name, "{}"),), may_think=False)
        matcher = Grammars(engine.tokenizer, engine.eos_ids, 416).matcher(request)
        assert matcher is not None
        for token in engine.tokenizer.encode(
            f'{CALLS}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {{}}}}'
        ):
            matcher.push(token)
        assert not matcher.failed, name
    with pytest.raises(UserError, match="the tools' names cannot be followed"):
        Request((1,), calls=(("\x7f", "{}"),))


class Lost(Matcher):
    """A grammar that became too complex after two tokens."""

    def __init__(self) -> None:
        self.left = 2

    def push(self, token: int) -> None:
        self.left -= 1

    @property
    def over(self) -> bool:
        return self.failed

    @property
    def failed(self) -> bool:
        return self.left == 0


def test_a_grammar_that_cannot_be_followed_ends_its_text(engine: Engine) -> None:
    reply = Reply(Request((1,)), 0, engine.tokenizer, engine.eos_ids, 999, Lost())
    reply.push(5)
    assert reply.finish is None
    reply.push(6)
    assert reply.finish == "length"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the JSON Schema is not JSON: Expecting property name"),
        ("[1]", "the JSON Schema must be a JSON object, not [1]"),
        ('{"type": "nothing"}', "the JSON Schema cannot be followed: Invalid type: nothing: leave that out"),
        ('{"not": {}}', 'the JSON Schema cannot be followed: Unimplemented keys: ["not"]'),
        ('{"type": "string", "pattern": "(a"}', "cannot be followed: regex parse error: (a ^ error: unclosed group"),
        ('{"items": [{"multipleOf": 1000003}]}', "multipleOf = 1000003 is too complex to follow, leave it out"),
        ('{"multipleOf": true}', "the JSON Schema cannot be followed"),
        ('{"type": "number", "multipleOf": Infinity}', "the JSON Schema"),
        ('{"items": ' * 3000 + "{}" + "}" * 3000, "the JSON Schema: nested too deeply, make it flatter"),
    ],
)
def test_bad_schemas(schema: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Request((1,), json_schema=schema)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count("the JSON Schema") == 1


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="a JSON Schema needs llguidance: pip install llguidance"):
        Request((1,), json_schema='{"const": "without"}')


def test_options(engine: Engine) -> None:
    prompter = Prompter(engine.tokenizer)
    changed = Options().changed({"json_schema": {"type": "integer"}})
    assert prompter.plain("Hi", changed).json_schema == '{"type": "integer"}'
    with pytest.raises(UserError, match="json_schema must be of type dict"):
        Options().changed({"json_schema": "integer"})


def test_output_of_before_there_were_schemas_is_continued() -> None:
    request = Request((1, 2, 3), seed=7)
    assert Line(1, request, {}, "model").digest == "e00fa56f6378bf45"
    assert Line(1, dataclasses.replace(request, json_schema="{}"), {}, "model").digest != "e00fa56f6378bf45"


def generated(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as exit:
        main(["--prompt", "What is 27 + 58?", "--greedy", "--max-tokens", "60", *map(str, args)])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out + err


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "integer", "maximum": 99}')
    code, out = generated(capsys, "--json-schema", file)
    assert code == 0 and out.splitlines()[3:5] == ["</think>", "85"]
    code, out = generated(capsys, "--json-schema", '{"enum": ["eighty-five"]}', "--no-thinking")
    assert code == 0 and '"eighty-five"' in out.splitlines()
    for bad in ("", tmp_path / "none.json", '{"type": 3}'):
        code, out = generated(capsys, "--json-schema", bad)
        assert code == 2 and out.startswith("error: ") and out.count("\n") == 1
