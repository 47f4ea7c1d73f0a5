"""Tokenizer folders, streaming detokeniser and chat templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import models, pre_tokenizers

from m1jax import UserError
from m1jax.chat_template import ChatTemplate
from m1jax.tokenizer import LONG, Detokeniser, Tokenizer
from tests.generation_fixtures import DATA, MARKS, train_tokenizer

M1_TEMPLATE = json.loads((DATA / "tokenizer_config.json").read_text())["chat_template"]
USER = "<beginning_of_sentence>user name=user\n{}<end_of_sentence>\n"
AI = "<beginning_of_sentence>ai name=assistant\n"
TEXTS = ["Hello world", " leading and trailing ", "ünïcödé 日本語 🙂", "<end_of_sentence>\n", "a\r\n\tb", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), keep=None) == text


def test_long_texts_are_encoded_alike(tokenizer: Tokenizer) -> None:
    text = ("The quick <think> 日本語 <end_of_sentence> 🙃\n" * 4000)[: LONG + 7]
    tokens = tokenizer.encode(text)
    assert len(text) > LONG and tokens == tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert (
        tokenizer.longest == max(len(tokenizer.bytes_of(i)) for i in range(tokenizer.size)) >= len("<end_of_sentence>")
    )


def test_special_tokens_are_one_token_and_hidden(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<end_of_sentence>")
    assert ids == [tokenizer.id_of("<end_of_sentence>")] and tokenizer.is_special(ids[0])
    assert tokenizer.decode(ids) == ""
    assert tokenizer.decode(ids, keep=["<end_of_sentence>"]) == "<end_of_sentence>"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_streaming_equals_full_decode(tokenizer: Tokenizer, folder: Path, data: st.DataObject) -> None:
    """Random tokens, which often are no valid UTF-8, and tokens past the end of the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 9), max_size=40))
    stream = Detokeniser(tokenizer)
    pieces = [*map(stream.push, ids), stream.flush()]
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert "".join(pieces) == backend.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_streaming_never_shows_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokeniser(tokenizer, keep=None)
    shown = ""
    for index in tokenizer.encode(text):
        shown += stream.push(index)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_a_vocabulary_that_is_not_byte_level(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello world hello")) == "hello world hello"


def test_gpt2_files_equal_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, gpt2_files=True)
    assert not (tmp_path / "tokenizer.json").exists()
    other = Tokenizer.load(tmp_path)
    assert other.eos_ids == tokenizer.eos_ids and other.size == tokenizer.size
    for text in [*TEXTS, "".join(MARKS), M1_TEMPLATE]:
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(other.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_gpt2_files_with_tokens_added_beside_them(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, gpt2_files=True)
    size = Tokenizer.load(tmp_path).size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<a><b>") == [size, size + 1]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 5}))
    with pytest.raises(UserError, match="should have id"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("value", "expected"), [(7, {7}), ([5, 6], {5, 6}), (None, set())])
def test_ends_of_turn(folder: Path, tmp_path: Path, value: object, expected: set[int]) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == expected | {tokenizer.id_of("<end_of_sentence>")}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "\xff"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}'),
        ("generation_config.json", '{"eos_token_id": "x"}'),
    ],
)
def test_damaged_folders_are_refused(folder: Path, tmp_path: Path, file: str, content: str | None) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_template_file_wins_over_config(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert Tokenizer.load(tmp_path).template == M1_TEMPLATE
    config = {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).template == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).template == "file"


@pytest.mark.parametrize("content", ["Hi {{x}}", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "{{x}}"}]])
def test_m1_template_takes_both_forms_of_content(content: object) -> None:
    out = ChatTemplate(M1_TEMPLATE).render([{"role": "system", "content": "S"}, {"role": "user", "content": content}])
    system = "<beginning_of_sentence>system ai_setting=assistant\nS<end_of_sentence>\n"
    assert out == "<begin_of_document>" + system + USER.format("Hi {{x}}") + AI


def test_m1_template_shows_tool_calls_and_results() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "é": [2]}'}}
    plain = {"name": "neg", "arguments": {}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>", "tool_calls": [call, plain]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [plain]},
    ]
    out = ChatTemplate(M1_TEMPLATE).render(messages, add_generation_prompt=False)
    first, second = '{"name": "add", "arguments": {"a": 1, "é": [2]}}', '{"name": "neg", "arguments": {}}'
    calls = f"<tool_calls>\n{first}\n{second}\n</tool_calls>"
    tool = "<beginning_of_sentence>tool name=tools\ntool name: add\ntool result: 3\n\n<end_of_sentence>\n"
    last = f"<tool_calls>\n{second}\n</tool_calls>"
    end = "<end_of_sentence>\n"
    turns = [USER.format("1+2?"), AI, "<think>\nadd\n</think>\n", calls, end, tool, AI, last, end]
    assert out == "<begin_of_document>" + "".join(turns)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", ["So 3.", [{"type": "text", "text": "So 3."}]])
def test_reasoning_comes_before_what_is_said(key: str, content: object) -> None:
    """In every turn, as M1's template keeps earlier thinking; once, also where a template reads the key itself."""
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": content, key: " I add.\n"},
        {"role": "user", "content": "Sure?", key: "not an assistant's"},
    ]
    out = ChatTemplate(M1_TEMPLATE).render(messages)
    said = "<think>\nI add.\n</think>\nSo 3."
    turns = [USER.format("1+2?"), AI, said, "<end_of_sentence>\n", USER.format("Sure?"), AI]
    assert out == "<begin_of_document>" + "".join(turns)
    reader = ChatTemplate("{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}")
    assert reader.render(messages[:2]) == "1+2?" + said


def test_a_tool_result_has_the_name_of_its_call_or_its_own() -> None:
    made = {"id": "c1", "name": "add", "arguments": {}}
    call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [made]}
    for own in (
        {"name": "sum", "content": "3"},
        {"content": [{"type": "text", "name": "sum", "text": "3"}]},
    ):
        out = ChatTemplate(M1_TEMPLATE).render([call, {"role": "tool", "tool_call_id": "c2", **own}])
        assert "tool name: sum\ntool result: 3" in out
    nameless = {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "3"}]}
    with pytest.raises(UserError, match="tool_call_id 'c2'"):
        ChatTemplate(M1_TEMPLATE).render([call, nameless])
    plain = {"role": "tool", "content": "3"}  # of the only call
    assert "tool name: add\ntool result: 3" in ChatTemplate(M1_TEMPLATE).render([call, plain])
    two = {**call, "tool_calls": [made, made]}
    for before in ([two], [call, two], [{"role": "user", "content": "x"}]):
        with pytest.raises(UserError, match="a tool's message names no function"):
            ChatTemplate(M1_TEMPLATE).render([*before, plain])


@pytest.mark.parametrize("wrapped", [False, True])
def test_m1_template_shows_tools_bare(wrapped: bool) -> None:
    tool = {"name": "add", "description": "größer", "parameters": {}}
    tools = [{"type": "function", "function": tool} if wrapped else tool]
    out = ChatTemplate(M1_TEMPLATE).render([{"role": "user", "content": "x"}], tools=tools)
    assert '\n<tools>\n{"name": "add", "description": "größer", "parameters": {}}\n</tools>\n' in out


def test_templates_of_the_usual_form() -> None:
    """String content, tool calls shown by the template itself, special tokens as variables."""
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}<{{ c.function.name }}:{{ c.function.arguments | tojson }}>"
        "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a<b"}]},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": "<"}}]},
    ]
    out = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    assert out == '<s>[user]a<b\n[assistant]b<f:{"x": "<"}>\n[assistant]'


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        ([{"role": "wizard", "content": "x"}], "wizard"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text only"),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}], "tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"arguments": {}}]}], "function name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "arguments": "{"}]}], "JSON"),
    ],
)
def test_malformed_conversations_are_refused(messages: list[dict[str, object]], error: str) -> None:
    with pytest.raises(UserError, match=error):
        ChatTemplate(M1_TEMPLATE).render(messages)


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[0].content.nothing.there }}", "{{ ''.__class__.mro() }}"],
)
def test_broken_templates_are_refused(source: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
