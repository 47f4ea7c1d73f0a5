"""Documents, their tokens, the rows they are packed into."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.tokenizer import Tokenizer
from m1jax.train import data
from m1jax.train import documents as documents_of
from m1jax.train.documents import Documents
from m1jax.train.encoder import Encoder, chat_tokens
from m1jax.train.settings import DataSettings
from tests.tools import HELLO

TALK = {"role": "assistant", "content": "One. " * 90}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def encoder(length: int = 8, vocab: int = 512, end: int | None = None) -> Encoder:
    return Encoder(Tokenizer.load(HELLO), length, vocab, end)


def test_long_documents_are_cut_so_that_every_token_is_predicted_once(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 3
    ids = Tokenizer.load(HELLO).encode(text)
    documents = Documents([write(tmp_path / "a.jsonl", {"text": text})], 8)
    samples = encoder(end=3)(documents[0])
    assert [int(t) for s in samples for t in s["targets"]] == [*ids[1:], 3]
    assert all(len(s["tokens"]) <= 8 and np.array_equal(s["tokens"][1:], s["targets"][:-1]) for s in samples)
    tokens = tmp_path / "a.npy"
    np.save(tokens, np.asarray(ids, np.uint16))
    stored = Documents([str(tokens)], 8)
    assert [int(t) for i in range(len(stored)) for s in encoder()(stored[i]) for t in s["targets"]] == ids[1:]


def test_only_the_assistants_turns_are_learnt(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(HELLO)
    turns = [("user", "Hello!"), ("assistant", "One."), ("user", "And now?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    tokens, weights = chat_tokens(tokenizer, messages)
    learnt = tokenizer.decode([int(t) for t, w in zip(tokens, weights, strict=True) if w], keep=None)
    assert learnt == "One.<end_of_sentence>Two.<end_of_sentence>"
    whole = tokenizer.decode(map(int, tokens), keep=None)
    assert whole.index("Hello!") < whole.index("One.") < whole.index("And now?") < whole.index("Two.")

    def chat(line: dict[str, Any]) -> tuple[str, str]:
        """What of the conversation is learnt, and all of it but its first token."""
        (sample,) = encoder(512)(Documents([write(tmp_path / "chat.jsonl", line)], 512)[0])
        learnt = sample["targets"][sample["weights"] > 0]
        return tokenizer.decode(learnt.tolist(), keep=None), tokenizer.decode(sample["targets"].tolist(), keep=None)

    line = {"prompt": "Hello!", "response": "One."}
    documents = Documents([write(tmp_path / "a.jsonl", line, {"messages": messages[:2]})], 64)
    one, other = (encoder(64)(documents[i])[0] for i in range(2))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    # Who speaks first has said nothing of what the template puts before it; tools on offer are read, not learnt.
    alone = chat({"messages": messages[1:2], "tools": [{"name": "add", "parameters": {}}]})
    assert alone[0] == "One.<end_of_sentence>" and "add" in alone[1] and alone[1].count("One.") == 1
    # What an assistant has thought is learnt, in M1's tags; a turn of weight 0 is only read.
    thought = {"role": "assistant", "reasoning_content": "Hm.", "content": "Two."}
    line = {"messages": [messages[0], messages[1] | {"weight": 0}, messages[2], thought]}
    learnt, whole = chat(line)
    assert learnt == "<think>\nHm.\n</think>\nTwo.<end_of_sentence>" and "One.<end_of_sentence>" in whole
    # The weight stands with the token that is predicted, not with the one that is read.
    assert tokenizer.decode([int(t) for t in one["targets"][one["weights"] > 0]], keep=None) == "One.<end_of_sentence>"


def file_of(save: Any, array: np.ndarray) -> bytes:
    """What `numpy.save` or `numpy.savez` writes."""
    stream = io.BytesIO()
    save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"fine\n\xff\n", "a.txt is not UTF-8 .line 2, byte 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'\n["text"]\n', "a.jsonl, line 2: expected an object"),
        (
            "a.jsonl",
            b'{"txt": "x"}\n',
            "a.jsonl, line 1: has neither text, tokens, messages, nor prompt and response, but txt",
        ),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text is not a string"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "no assistant's message"),
        ("a.jsonl", b'{"prompt": "x", "response": "y", "tools": {"a": 1}}\n', "line 1: tools is not a list"),
        ("a.jsonl", b'{"prompt": "x", "response": "far too long for eight"}\n', "tokens: raise data.length"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x", "weight": "1"}]}\n',
            "weight '1' of a message",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x", "weight": 1e39}]}\n',
            "weight 1e[+]39 of a message must be a number, 0 or more, that float32 holds",
        ),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "reasoning": 1}]}\n', "reasoning_content is not a string"),
        ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl is empty"),
        ("a.csv", b"x", "unknown kind '.csv'"),
        ("a.npy", b"x", "is not a NumPy file"),
        ("a.npy", b"", "is not a NumPy file"),
        ("a.jsonl", b'{"tokens": [1.7, 2]}\n', "tokens or weights is not a list of numbers"),
        ("a.jsonl", b'{"tokens": [-1, 5]}\n', "token -1 is outside the model's vocabulary"),
        ("a.jsonl", b'{"tokens": [5, 4294967297]}\n', "token 4294967297 is outside the model's vocabulary"),
        ("a.npy", file_of(np.save, np.asarray([5, 4294967297])), "token 4294967297 is outside the model's vocabulary"),
        ("a.npy", file_of(np.savez, np.arange(9)), "a.npy is an archive of arrays: save one array"),
        ("a.jsonl", b'{"tokens": [5, 6], "weights": [0, NaN]}\n', "line 1: weights must be finite, and 0 or more"),
        ("a.jsonl", b'{"tokens": [5, 6], "weights": [1, -1]}\n', "line 1: weights must be finite, and 0 or more"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents = Documents([str(tmp_path / "*")], 8)
        for i in range(len(documents)):
            encoder()(documents[i])


def test_data_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="matches no file"):
        Documents([str(tmp_path / "*.txt")], 8)
    with pytest.raises(UserError, match="is empty: name the files"):
        Documents([], 8)
    documents = Documents([write(tmp_path / "a.jsonl", {"text": "a"})], 8)
    with pytest.raises(UserError, match="no document has two tokens"):
        data.check(documents, encoder())
    with pytest.raises(UserError, match="outside the model's vocabulary of 9"):
        encoder(vocab=9)(Documents([write(tmp_path / "b.jsonl", {"text": "Hello there"})], 8)[0])


def test_conversations_that_are_too_long_are_all_counted(tmp_path: Path) -> None:
    said = [{"prompt": "Hello!", "response": "One. " * n} for n in (1, 90, 1, 10, 60)]
    documents = Documents([write(tmp_path / "a.jsonl", *said)], 64)
    longest = len(chat_tokens(Tokenizer.load(HELLO), [{"role": "user", "content": "Hello!"}, TALK])[0])
    found = rf"line 2: the conversation has \d+ tokens: .* … and 1 more; the longest has {longest} tokens$"
    with pytest.raises(UserError, match=found):
        data.check(documents, encoder(100))
    with pytest.raises(UserError, match=r"line 2: the conversation has \d+ tokens: raise data.length or remove it$"):
        data.check(Documents([write(tmp_path / "b.jsonl", *said[:3])], 64), encoder(100))


def test_a_text_in_parts_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part before the last has no end token, and a run from when it had one does not go on."""
    file = tmp_path / "a.txt"
    file.write_text("One two.\n" * 6)
    whole = Documents([str(file)], 512)
    monkeypatch.setattr(documents_of, "_PART", 20)  # three lines each
    parts = Documents([str(file)], 512)
    assert (len(whole), len(parts)) == (1, 2) and "".join(text for _, text in parts.part(0, 1)) == "One two.\n" * 6
    last = [encoder(512, end=3)(parts[i])[-1]["targets"][-1] for i in range(2)]
    assert last[0] != 3 and last[1] == 3 == encoder(512, end=3)(whole[0])[-1]["targets"][-1]
    assert whole.fingerprint == parts.fingerprint and whole.contents != parts.contents
    lines = [{"text": "One."}, {"text": "Two."}]
    documents = Documents([write(tmp_path / "b.jsonl", *lines)], 8)
    assert all(encoder(end=3)(documents[i])[-1]["targets"][-1] == 3 for i in range(2))


def test_files_of_a_byte_order_mark_and_links(tmp_path: Path) -> None:
    """The mark is no text; a file that several names lead to is read once, and one of `without` not at all."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Hello"}\n\n{"text": "there"}\n')
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfHello there")
    write(folder / "c.jsonl", {"text": "held out"})
    np.save(folder / "d.npy", np.arange(20))
    (folder / "loop").symlink_to(folder)
    documents = Documents([f"{folder}/**/*.*", f"{folder}/../corpus/a.jsonl"], 8, without=[f"{folder}/loop/c*"])
    found = [(str(place), value) for place, value in documents.part(0, 1)]
    assert [value for _, value in found[:3]] == [{"text": "Hello"}, {"text": "there"}, "Hello there"]
    assert found[1][0].endswith("/a.jsonl, line 3") and len(documents) == 6
    assert [value.tolist() for _, value in found[3:]] == [[*range(9)], [*range(8, 17)], [*range(16, 20)]]
    assert [str(documents[i][0]) for i in range(6)] == [place for place, _ in found]
    assert [place for place, _ in documents.part(1, 2)] == [documents.place(i) for i in (1, 3, 5)]
    with pytest.raises(UserError, match=r"matches nothing but files of data\.validation"):
        Documents([f"{folder}/c*"], 8, without=[f"{folder}/*"])


def test_rows_that_no_machine_holds_are_refused(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, length=10**11)
    with pytest.raises(UserError, match=r"data.length = 100000000000 with data.bins = 4 .* needs \d+ GB of memory"):
        data.Batches(corpus(tmp_path), encoder(12), settings, 0)


SETTINGS = DataSettings(length=12, rows=2, accumulate=2, bins=4)


def corpus(tmp_path: Path, count: int = 40) -> Documents:
    lines = [{"text": f"{i} and {i + 1} " * (1 + i % 3)} for i in range(count)]
    return Documents([write(tmp_path / "corpus.jsonl", *lines)], 12)


@pytest.mark.parametrize("streams", [1, 2])
def test_batches_are_the_same_again_and_go_on_from_a_saved_position(tmp_path: Path, streams: int) -> None:
    documents, settings = corpus(tmp_path), dataclasses.replace(SETTINGS, streams=streams)

    def some(n: int, seed: int = 0, position: Any = None) -> list[dict[str, np.ndarray]]:
        source = data.Batches(documents, encoder(12), settings, seed)
        if position is not None:
            source.set_state(position)
        out = [next(source) for _ in range(n)]
        source.close()
        return out

    def same(a: Any, b: Any) -> bool:
        return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)

    source, first, positions = data.Batches(documents, encoder(12), settings, 0), [], []
    for _ in range(12):  # two epochs
        positions.append(json.loads(json.dumps(source.get_state())))
        first.append(next(source))
    source.close()
    assert same(some(12), first) and not same(some(12, seed=1), first)
    for at in (1, 5, 9):
        assert same(some(12 - at, position=positions[at]), first[at:])
    if streams == 1:  # positions from before there were streams
        assert same(some(11, position=positions[1]["0"]), first[1:])
    for batch in first:
        assert batch["tokens"].shape == (2, 2, 12)
        starts = np.diff(batch["segments"], axis=-1, prepend=-1) != 0
        inside = (batch["segments"] > 0) & ~starts
        assert np.array_equal(batch["tokens"][inside], np.roll(batch["targets"], 1, -1)[inside])
        assert not batch["weights"][batch["segments"] == 0].any()


def test_streams_fill_rows_of_their_own_and_leave_out_no_document(tmp_path: Path) -> None:
    """Whoever reads a stream gets the same rows of it; all streams together read an epoch's documents once each."""
    lines = [{"tokens": [i] * 13} for i in range(40)]  # each fills a row: an epoch is ten batches
    documents = Documents([write(tmp_path / "corpus.jsonl", *lines)], 12)
    settings = DataSettings(length=12, rows=4, bins=1, streams=2)

    def some(*own: slice) -> tuple[set[str], np.ndarray]:
        source = data.Batches(documents, encoder(12), settings, 0, own)
        read, tokens = set(source.get_state()), [next(source)["tokens"][0, :, 0] for _ in range(11)]
        source.close()
        return read, np.stack(tokens)

    read, whole = some(slice(0, 2), slice(2, 4))
    assert read == {"0", "1"} and sorted(whole[:10].flat) == list(range(40)) and (whole[10] != whole[0]).any()
    for own, stream in ((slice(0, 2), 0), (slice(1, 2), 0), (slice(2, 4), 1)):
        read, part = some(own)
        rows = slice(2 * stream, 2 * stream + 2)
        assert read == {str(stream)} and np.array_equal(part[:, rows], whole[:, rows])
        part[:, rows] = 0
        assert not part.any()
