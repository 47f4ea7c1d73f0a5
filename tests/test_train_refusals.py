"""What `python -m m1jax.train` refuses before it trains: bad input, bad data, too little memory, missing packages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from m1jax.errors import UserError
from m1jax.params import count
from m1jax.sharding import sizes
from m1jax.train import __main__ as command
from m1jax.train import data, loop, supervised
from m1jax.train.parts import fresh, prepare
from tests.checkpoints import run as run_command
from tests.training import CONFIG, ENVIRONMENT, settings, toml, write_corpus, write_toml


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"row": 3}}, "unknown key data.row: did you mean data.rows?"),
        ({"data": {"files": ["none/*.txt"]}}, "none/*.txt matches no file"),
        ({"data": {"validation": ["none/*.txt"]}}, "data.validation: none/*.txt matches no file"),
        ({"data": {"validate_every": 0}}, "data.validate_every = 0 must be 1 or more"),
        ({"stage": "rl", "data": {"validation": ["a.txt"]}}, "data.validation has no meaning in stage rl"),
        ({"model": {"tokenizer": "none"}}, "none has no tokenizer.json"),
        ({"mesh": "data=3"}, "needs 3 devices"),
        ({"mesh": "datum=1"}, "unknown axis 'datum'"),
        ({"data": {"end_token": "<none>"}}, "'<none>' is no token of"),
        ({"mesh": "data=8"}, "data.rows = 2 does not divide among 8 groups of devices"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "fresh", None)  # what is cheap is checked before a weight is made
    file = write_toml(toml(folder, tmp_path / "out", **changes), tmp_path / "a.toml")
    assert run_command(command, "--config", file, monkeypatch=monkeypatch) == 2
    text = capsys.readouterr().err
    assert message in text and text.startswith("error: ") and text.count("\n") == 1


def test_a_bad_validation_document_is_found_before_the_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"text": "This one is fine."}\n{"text": 3}\n')
    with pytest.raises(UserError, match="line 2: text is not a string"):
        supervised.run(settings(folder, tmp_path / "out", data={"validation": [str(tmp_path / "validation.jsonl")]}))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "bad", "message"),
    [
        ("sft", {"prompt": "Hello!", "response": "One. " * 90}, r"the conversation has \d+ tokens: raise data.length"),
        ("pretrain", {"text": 3}, "text is not a string"),
        ("pretrain", {"tokens": [1, 512]}, "token 512 is outside the model's vocabulary"),
        ("pretrain", {"text": "a\ud800b"}, "the text is not valid UTF-8"),
    ],
)
def test_a_bad_document_is_found_before_the_training(
    folder: Path, tmp_path: Path, stage: str, bad: dict[str, Any], message: str
) -> None:
    """The last of all, which the first epoch would reach late: without it the run could not go on."""
    lines = [{"prompt": "Hello!", "response": "One."}] * 60 + [bad]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"files": [str(tmp_path / "chat.jsonl")], "length": 64}
    with pytest.raises(UserError, match=f"line 61: {message}"):
        supervised.Supervised(prepare(settings(folder, tmp_path / "out", stage=stage, data=data)))


def test_data_is_looked_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large corpus the check takes long: runs that go on from a kill, with the same data, leave it out."""
    looked: list[str] = []
    monkeypatch.setattr(data, "check", lambda documents, encoder: looked.append(documents.name))
    (tmp_path / "held.jsonl").write_text('{"text": "This one is fine."}\n')
    held = {"data": {"validation": [str(tmp_path / "held.jsonl")]}}
    for changes, times in (({}, 1), ({}, 1), ({"data": {"length": 20}}, 2), (held, 4)):
        supervised.Supervised(prepare(settings(folder, tmp_path / "out", **changes))).close()
        assert len(looked) == times
    assert looked[-1] == "data.validation"


def test_a_model_larger_than_memory_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and two moments, and the counters, on each device."""
    needed = 3 * 4 * count(CONFIG) + 6 * 4
    split = settings(folder, tmp_path, mesh="data=2,expert=4", data={"rows": 8})
    monkeypatch.setattr(sizes, "host_memory", lambda: needed)
    parts = prepare(settings(folder, tmp_path))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(fresh(parts))) == needed
    with pytest.raises(UserError, match=r"config.json needs .* GB of memory on this machine for weights and moments"):
        prepare(split)
    monkeypatch.setattr(sizes, "host_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"try mesh = 'data=1,.*' of \d+ devices, or train a smaller model"):
        prepare(settings(folder, tmp_path))
    monkeypatch.setattr(sizes, "host_memory", lambda: 4 * needed)
    with pytest.raises(UserError, match="try mesh = '") as refused:
        prepare(settings(folder, tmp_path, mesh="data=8", data={"rows": 8}))
    prepare(settings(folder, tmp_path, mesh=str(refused.value).split("'")[1], data={"rows": 8}))
    monkeypatch.setattr(sizes, "host_memory", lambda: 8)
    with pytest.raises(UserError, match="are free: train a smaller model"):
        prepare(settings(folder, tmp_path))


def test_without_grain_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    file = write_toml(toml(folder, tmp_path / "out"), tmp_path / "a.toml")
    code = "import sys; sys.modules['grain'] = None; from m1jax.train.__main__ import main; main()"
    line = [sys.executable, "-c", code, "--config", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "error: training needs grain: pip install 'm1jax[train]'\n")


def test_what_drawing_needs_is_missed_before_the_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install 'm1jax\[train\]'"):
        supervised.run(settings(folder, tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
