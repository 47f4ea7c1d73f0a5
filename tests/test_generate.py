"""`python -m m1jax.generate`, through `main()` and as a process of its own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m1jax import errors, jsonl, modes
from m1jax.engine import Engine
from m1jax.generate import main
from m1jax.loading import load
from m1jax.reply import CLOSE, OPEN
from m1jax.runtime import Interrupts
from tests.generation_fixtures import tiny_config, write_model


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1], max_position_embeddings=256)
    return write_model(tmp_path_factory.mktemp("models") / "tiny", config)


class SharingEngine(Engine):
    """An engine that keeps the functions compiled by the ones before: all models here have the same shapes."""

    compiled: ClassVar[dict[Any, Any]] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._compiled = self.compiled


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process: its exit code, stdout and stderr."""

    monkeypatch.setattr(modes, "Engine", SharingEngine)

    def call(*args: object, stdin: bytes = b"", folder: Path = model) -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit:
            main(["--model", str(folder), *map(str, args)])
        out, err = capsys.readouterr()
        return Result(int(exit.value.code or 0), out, err)

    return call


def process(model: Path, *args: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "m1jax.generate", "--model", str(model), *map(str, args)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "jax")}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)


def write_lines(file: Path, lines: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- one prompt ---------------------------------------------------------------------------------------------------


def test_text_on_stdout_figures_on_stderr(run: Run) -> None:
    result = run("--prompt", "Hello", "--max-tokens", 8, "--seed", 1)
    assert result.code == 0 and result.out.endswith("\n") and "\x1b" not in result.out + result.err
    for part in ("prompt 2", "tokens at", "generated ", "loading", "peak memory process", "seed 1"):
        assert part in result.err
    assert len(result.err.splitlines()) == 1
    assert run("--prompt", "Hello", "--max-tokens", 8, "--seed", 1).out == result.out


def test_prompt_from_stdin_and_file(run: Run, tmp_path: Path) -> None:
    flags = ("--greedy", "--max-tokens", 8, "--json")
    expected = json.loads(run("--prompt", "Grüße\nan alle", *flags).out)["text"]
    data = "Grüße\nan alle\n".encode()
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + data)
    assert json.loads(run("--prompt", "-", *flags, stdin=data).out)["text"] == expected
    assert json.loads(run("--prompt-file", tmp_path / "prompt.txt", *flags).out)["text"] == expected


def test_json(run: Run) -> None:
    out = json.loads(run("--prompt", "Hello", "--max-tokens", 8, "-n", 2, "--seed", 5, "--json").out)
    assert len(out["samples"]) == 2 and out["text"] == out["samples"][0]["text"] and out["seed"] == 5
    assert {"text", "thinking", "answer", "finish", "generated_tokens"} == set(out["samples"][0])
    stats = out["stats"]
    assert stats["generated_tokens"] == sum(sample["generated_tokens"] for sample in out["samples"])
    assert stats["peak_process_memory_bytes"] > 2**20 and stats["prompt_tokens_per_second"] > 0
    one = json.loads(run("--prompt", "Hello", "--max-tokens", 8, "--seed", 5, "--json").out)
    assert one["text"] == out["text"] and one["stats"]["prompt_tokens"] == stats["prompt_tokens"]
    few = run("--prompt", "Hello", "--max-tokens", 8, "-n", 3, "--batch-size", 1, "--seed", 5, "--json")
    assert json.loads(few.out)["stats"]["prompt_tokens"] == stats["prompt_tokens"]


def test_logprobs(run: Run, tmp_path: Path) -> None:
    """In one JSON object, and of the lines of a file that want them."""
    flags = ("--prompt", "Hello", "--max-tokens", 5, "--seed", 5, "--json")
    plain, told = (json.loads(run(*flags, *more).out)["samples"][0] for more in ((), ("--logprobs", 2)))
    logprobs = told.pop("logprobs")
    assert told == plain and len(logprobs) == told["generated_tokens"] == 5
    assert "".join(one["token"] for one in logprobs) == told["text"]
    assert all(one["logprob"] <= one["best"][0]["logprob"] <= 0 and len(one["best"]) == 2 for one in logprobs)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hello", "seed": 5, "logprobs": 2}\n{"prompt": "Hello", "seed": 5}\n')
    assert run("--input", source, "--output", out, "--max-tokens", 5).code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["id"] for one in lines[0]["logprobs"]] == [one["id"] for one in logprobs] and "logprobs" not in lines[1]


def test_samples_have_headings(run: Run) -> None:
    result = run("--prompt", "Hello", "--max-tokens", 6, "-n", 2, "--seed", 5, "--batch-size", 1)
    samples = json.loads(run("--prompt", "Hello", "--max-tokens", 6, "-n", 2, "--seed", 5, "--json").out)["samples"]
    expected = "".join(
        f"=== {i} of 2 ===\n{s['text']}" + "\n" * (not s["text"].endswith("\n") and s["text"] != "")
        for i, s in enumerate(samples, 1)
    )
    assert result.out == expected


def test_template_system_and_raw(run: Run) -> None:
    def prompt_tokens(*args: str) -> int:
        return json.loads(run(*args, "--max-tokens", 1, "--json").out)["stats"]["prompt_tokens"]

    assert prompt_tokens("--prompt", "a", "--raw") == 1 < prompt_tokens("--prompt", "a")
    assert prompt_tokens("--prompt", "a") < prompt_tokens("--prompt", "a", "--system", "x")
    assert prompt_tokens("--prompt", "a") < prompt_tokens("--prompt", "a", "--no-thinking")


def test_thinking_budget(run: Run) -> None:
    flags = ("--raw", "--max-tokens", 30, "--seed", 3, "--json")
    sample = json.loads(run("--prompt", f"a{OPEN}\n", "--thinking-budget", 4, *flags).out)["samples"][0]
    assert CLOSE in sample["text"] and sample["thinking"] is not None
    assert sample["text"].partition(CLOSE)[2].lstrip("\n") == sample["answer"]


def test_dtype_reaches_the_loader(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(modes, "load", lambda path, *how, **where: asked.append((*how, where)) or load(path))
    assert run("--prompt", "Hello", "--max-tokens", 2, "--dtype", "bfloat16", "--quantize", "int8").code == 0
    assert asked == [("bfloat16", "int8", {"mesh": None, "adapter": None})]


def test_stop(run: Run) -> None:
    text = json.loads(run("--prompt", "Hello", "--greedy", "--max-tokens", 20, "--json").out)["text"]
    stop = text[5:8]
    result = run("--prompt", "Hello", "--greedy", "--max-tokens", 20, "--stop", stop, "--stop", "never there")
    assert result.out.rstrip("\n") == text[: text.index(stop)].rstrip("\n") and "stop string" in result.err


# --- conversations ------------------------------------------------------------------------------------------------


def test_interactive(run: Run) -> None:
    """Each message gets a reply and its figures; blank lines are passed over."""
    result = run("--interactive", "--greedy", "--max-tokens", 6, stdin=b"Hello\n\nAnd now?\n")
    assert result.code == 0 and result.err.count("prompt ") == 2
    first = json.loads(run("--prompt", "Hello", "--greedy", "--max-tokens", 6, "--json").out)["text"]
    assert result.out.startswith(first)


def test_interactive_until_the_context_is_full(run: Run) -> None:
    result = run("--interactive", "--greedy", "--max-tokens", 100, stdin=b"Hello there\n" * 20)
    assert result.code == 2 and "context is 256" in result.err.splitlines()[-1]


# --- JSONL --------------------------------------------------------------------------------------------------------

LINES = [
    {"prompt": "Hello", "id": "first", "metadata": {"answer": [1]}},
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "n": 2},
    {"prompt": "raw text", "raw": True, "greedy": True, "stop": "zzz"},
    {"prompt": "Hello", "temperature": 0.5, "top_k": 5, "seed": 9, "no_thinking": True},
    {"prompt": "17 * 24 =", "min_p": 0.1, "repetition_penalty": 1.1, "thinking_budget": 2},
]
FLAGS = ("--max-tokens", 9, "--batch-size", 2)


@pytest.fixture
def finished(run: Run, tmp_path: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Input, output and its lines after an undisturbed run."""
    source, out = write_lines(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    result = run("--input", source, "--output", out, *FLAGS)
    assert result.code == 0 and result.out == "" and "6/6" in result.err
    return source, out, read_lines(out)


def test_lines_equal_single_runs(run: Run, finished: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    lines = finished[2]
    assert [(line["line"], line["sample"]) for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0)]
    assert lines[0]["id"] == "first" and lines[0]["metadata"] == {"answer": [1]}
    flags = ("--json", "--max-tokens", 9, "--seed", lines[0]["seed"])
    one = json.loads(run("--prompt", "Hello", *flags).out)
    assert lines[0]["text"] == one["text"] and lines[0]["prompt_tokens"] == one["stats"]["prompt_tokens"]
    two = json.loads(run("--prompt", "Hello", "-n", 2, "--json", "--max-tokens", 3, "--seed", lines[1]["seed"]).out)
    assert [line["text"] for line in lines[1:3]] == [sample["text"] for sample in two["samples"]]
    raw = json.loads(run("--prompt", "raw text", "--raw", "--greedy", *flags).out)
    assert lines[3]["text"] == raw["text"] and lines[3]["prompt_tokens"] == raw["stats"]["prompt_tokens"]


def test_a_line_switches_greedy_off(run: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hello", "greedy": false}\n')
    flags = ("--max-tokens", 9, "--seed", 0)
    assert run("--greedy", "--input", source, "--output", out, *flags).code == 0
    line = json.loads(out.read_text())
    alone = run("--prompt", "Hello", "--json", *flags[:2], "--seed", line["seed"])
    assert line["text"] == json.loads(alone.out)["text"]


def test_lines_have_seeds_of_their_own(run: Run, tmp_path: Path) -> None:
    """One prompt many times has many texts; the same again with the same --seed, and with a line's own seed."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Hello"}\n' * 3 + '{"prompt": "Hello", "seed": 4}\n')
    found: list[list[dict[str, Any]]] = []
    for name, flags in (("a", ()), ("b", ("--seed", 0)), ("c", ("--seed", 1))):
        assert run("--input", source, "--output", tmp_path / name, "--max-tokens", 9, *flags).code == 0
        found.append(read_lines(tmp_path / name))
    assert found[0] == found[1] and len({line["text"] for line in found[0]}) == 4
    assert len({line["seed"] for line in (*found[0], *found[2])}) == 7 and found[0][3] | {"request": ""} == found[2][
        3
    ] | {"request": ""}


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
@pytest.mark.parametrize("torn", ["", '{"line": 5, "sam', '{"li', "whole"])
def test_a_broken_off_run_continues(
    run: Run, finished: tuple[Path, Path, list[dict[str, Any]]], keep: int, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any lines in any order, and a last one cut anywhere, even just before its newline."""
    source, out, _ = finished
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)[::-1]
    left = b"".join(lines[:keep])
    out.write_bytes(left[:-1] if torn == "whole" else left + torn.encode())
    written: list[int] = []
    append = jsonl.Output.append
    monkeypatch.setattr(jsonl.Output, "append", lambda self, *args: (written.append(1), append(self, *args)))
    assert run("--input", source, "--output", out, *FLAGS).code == 0
    assert out.read_bytes() == whole and len(written) == 6 - keep


def test_output_of_other_options_is_refused(run: Run, finished: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    source, out, _ = finished
    whole = out.read_bytes()
    result = run("--input", source, "--output", out, "--max-tokens", 8)
    assert result.code == 2 and "other options" in result.err and out.read_bytes() == whole


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("change", ["dtype", "quantize", "weights", "config"])
def test_output_of_another_model_is_refused(
    run: Run, model: Path, finished: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path, change: str, whole: bool
) -> None:
    source, out, lines = finished
    assert {line["precision"] for line in lines} == {"float32"}
    left = b"".join(out.read_bytes().splitlines(keepends=True)[: None if whole else 3])
    out.write_bytes(left)
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    flags: tuple[object, ...] = ()
    if change == "weights":
        with (folder / "model.safetensors").open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\0")
    elif change == "config":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "rope_theta": 5.0}))
    else:
        flags = ("--dtype", "bfloat16") if change == "dtype" else ("--quantize", "int8")
    result = run("--input", source, "--output", out, *FLAGS, *flags, folder=folder)
    assert result.code == 2 and "or other options" in result.err and out.read_bytes() == left
    assert run("--input", source, "--output", out, *FLAGS).code == 0 and read_lines(out) == lines


def test_output_of_mixed_precisions_is_refused(run: Run, finished: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    source, out, lines = finished
    write_lines(out, [lines[0], {**lines[1], "precision": "bfloat16"}])
    result = run("--input", source, "--output", out, *FLAGS)
    assert result.code == 2 and "other options (its line 2)" in result.err


@pytest.mark.parametrize(
    "content", ["notes\n", "notes", '{"line": 1}\n', "[]\n", "\n", '{"line": 99, "sample": 0, "request": ""}']
)
def test_foreign_output_is_left_alone(run: Run, tmp_path: Path, content: str) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    out.write_text(content)
    result = run("--input", source, "--output", out)
    assert result.code == 2 and str(out) in result.err and out.read_text() == content


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: not a JSON object"),
        ("{}", "line 2: give either prompt or messages"),
        ('{"prompt": "x", "messages": []}', "line 2: give either"),
        ('{"prompt": "x", "prompt": "y"}', "line 2: not valid JSON (the key 'prompt' comes twice)"),
        ('{"prompt": "x", "temprature": 1}', "line 2: unknown key 'temprature'"),
        ('{"prompt": "x", "n": true}', "line 2: n must be of type int"),
        ('{"prompt": "x", "top_p": 2}', "line 2: top-p"),
        ('{"prompt": "x", "stop": [1]}', "line 2: stop"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"prompt": 5}', "line 2: prompt must be a string"),
        ('{"messages": []}', "line 2: the conversation is empty"),
        ('{"messages": [{"role": "x", "content": ""}]}', "line 2: message role 'x'"),
        ('{"prompt": "x", "greedy": true, "temperature": 1}', "line 2: greedy"),
        (
            '{"prompt": "%s", "raw": true}' % ("x" * 300),
            "line 2: the prompt has 300 tokens, the model's context is 256",
        ),
        ('{"prompt": "x", "temperature": 1%s}' % ("0" * 400), "line 2: temperature must be from 0"),
        ('{"prompt": "x", "temperature": 1%s}' % ("0" * 5000), "line 2: not valid JSON"),
        ('{"prompt": "x", "repetition_penalty": 1%s}' % ("0" * 400), "line 2: repetition-penalty"),
        ('{"prompt": "x", "n": 1000000000}', "line 2: n must be at most 100000"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"prompt": "\\ud800"}', "line 2: the text is not valid UTF-8"),
        ('{"prompt": "x", "metadata": "\\ud800"}', "line 2: id and metadata must be Unicode"),
        ('{"prompt": "x", "id": ["\\udfff"]}', "line 2: id and metadata must be Unicode"),
        ('{"prompt": "x", "id": NaN}', "line 2: not valid JSON (NaN is not JSON)"),
        ('{"prompt": "x", "metadata": [-Infinity]}', "line 2: not valid JSON (-Infinity is not JSON)"),
        ('{"prompt": "x", "id": 1e999}', "line 2: id and metadata must hold finite numbers"),
    ],
)
def test_malformed_lines_are_named(run: Run, tmp_path: Path, line: str, error: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n")
    result = run("--input", source, "--output", out)
    assert result.code == 2 and error in result.err and len(result.err.splitlines()) == 1 and not out.exists()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", " \n "), "prompt is empty"),
        (("--prompt", "-"), "prompt is empty"),
        (("--prompt", "", "--raw"), "prompt is empty"),
        (("--prompt", "x" * 300, "--raw"), "300 tokens, the model's context is 256"),
        (("--prompt", "\udcff"), "UTF-8"),
        (("--prompt", "x", "--max-tokens", "-1"), "max-tokens"),
        (("--prompt", "x", "--max-tokens", "0"), "max-tokens"),
        (("--prompt", "x", "--max-tokens", "many"), "max-tokens"),
        (("--prompt", "x", "--top-p", "0"), "top-p"),
        (("--prompt", "x", "--top-p", "1.5"), "top-p"),
        (("--prompt", "x", "--top-p", "nan"), "top-p"),
        (("--prompt", "x", "--top-k", "-1"), "top-k"),
        (("--prompt", "x", "--min-p", "2"), "min-p"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--repetition-penalty", "0"), "repetition-penalty"),
        (("--prompt", "x", "--seed", "-1"), "seed"),
        (("--prompt", "x", "--seed", str(2**32)), "seed"),
        (("--prompt", "x", "-n", "0"), "n must be"),
        (("--prompt", "x", "-n", "1000000000"), "n must be at most 100000"),
        (("--prompt", "x", "--temperature", "1e39"), "temperature must be from 0"),
        (("--prompt", "x", "--batch-size", "0"), "batch-size"),
        (("--prompt", "x", "--stop", ""), "stop string is empty"),
        (("--prompt", "x", "--thinking-budget", "-1"), "thinking-budget"),
        (("--prompt", "x", "--thinking-budget", "1", "--no-thinking"), "no-thinking"),
        (("--prompt", "x", "--greedy", "--temperature", "0.5"), "greedy"),
        (("--prompt", "x", "--raw", "--system", "y"), "system"),
        (("--prompt", "x", "--dtype", "int8"), "dtype"),
        (("--prompt", "x", "--nonsense"), "nonsense"),
        (("--prompt", "x", "--prompt-file", "y"), "not allowed with"),
        ((), "required"),
        (("--prompt-file", "/nowhere"), "/nowhere cannot be read: No such file"),
        (("--interactive", "--input", "x"), "not allowed with"),
        (("--interactive", "--raw"), "raw"),
        (("--interactive", "-n", "2"), "drop -n"),
        (("--interactive", "--json"), "json"),
        (("--prompt", "x", "--logprobs", "3"), "--logprobs are told in JSON"),
        (("--prompt", "x", "--logprobs", "21", "--json"), "logprobs must be from 0 to 20, not 21"),
        (("--input", "x"), "--input needs --output"),
        (("--prompt", "x", "--output", "y"), "--output goes with --input"),
        (("--input", "/nowhere", "--output", "y"), "/nowhere cannot be read"),
    ],
)
def test_bad_arguments_get_one_line(run: Run, args: tuple[str, ...], error: str) -> None:
    result = run(*args)
    assert result.code == 2 and result.out == "" and error in result.err
    assert result.err.startswith("error: ") and len(result.err.splitlines()) == 1


def test_greedy_with_temperature_zero_is_fine(run: Run) -> None:
    assert run("--prompt", "x", "--greedy", "--temperature", "0", "--max-tokens", 2).code == 0


def test_bad_files_get_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    source = write_lines(tmp_path / "in.jsonl", LINES)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    cases = [
        (("--prompt-file", tmp_path / "latin1.txt"), "latin1.txt is not valid UTF-8 (byte 2)"),
        (("--prompt-file", tmp_path), "cannot be read"),
        (("--input", tmp_path / "latin1.txt", "--output", tmp_path / "o"), "not valid UTF-8"),
        (("--input", tmp_path / "empty.jsonl", "--output", tmp_path / "o"), "no lines"),
        (("--input", source, "--output", tmp_path / "no" / "o"), "cannot be written"),
        (("--input", source, "--output", tmp_path), "cannot be written"),
        (("--input", source, "--output", source), "the same file"),
        (("--input", source, "--output", "/dev/zero"), "not an ordinary file"),
    ]
    for args, error in cases:
        result = run(*args)
        assert result.code == 2 and error in result.err and len(result.err.splitlines()) == 1


def test_bad_folders_get_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    def folder(name: str, without: str = "", **files: str) -> Path:
        shutil.copytree(model, tmp_path / name, ignore=shutil.ignore_patterns(without))
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(content)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "nowhere", "not a folder"),
        (tmp_path / "empty", "config.json does not exist"),
        (folder("a", without="tokenizer.json"), "has no tokenizer.json"),
        (folder("b", without="*.safetensors"), "safetensors"),
        (folder("c", tokenizer_config="{}"), "no chat template"),
        (folder("d", tokenizer="{}"), "tokenizer in"),
        (folder("e", config='{"model_type": "llama"}'), "llama"),
        (folder("f", tokenizer_config='{"chat_template": "{% for %}"}'), "chat template is not valid"),
    ]
    for path, error in cases:
        result = run("--prompt", "x", folder=path)
        assert result.code == 2 and error in result.err and len(result.err.splitlines()) == 1, path


def test_a_folder_without_end_token_is_warned_about(run: Run, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer_config.json")))
    flags = ("--prompt", "x", "--raw", "--max-tokens", 2)
    result = run(*flags, folder=folder)
    warning, _ = result.err.splitlines()
    assert result.code == 0 and str(folder) in warning and "eos_token" in warning and "--stop" in warning
    assert "warning" not in run(*flags, "--stop", "zzz", folder=folder).err + run(*flags).err
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert "warning" not in run(*flags, folder=folder).err


def test_nan_weights_are_located(run: Run, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    result = run("--prompt", "x", "--raw", folder=tmp_path)
    assert result.code == 2 and "layer 1 (softmax)" in result.err and len(result.err.splitlines()) == 1


# --- as a process -------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_generated(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The signal comes after the third event, as if from the keyboard."""
    real, count = modes.Printer.show, iter(range(100))

    def show(self: modes.Printer, event: Any) -> None:
        real(self, event)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(modes.Printer, "show", show)
    whole = run("--prompt", "17 * 24", "--greedy", "--raw", "--max-tokens", 40, "--json")
    result = run("--prompt", "17 * 24", "--greedy", "--raw", "--max-tokens", 40)
    assert result.code == 130 and "interrupted" in result.err
    assert 0 < len(result.out) < 30 and json.loads(whole.out)["text"].startswith(result.out.rstrip("\n"))


def test_second_ctrl_c_quits_at_once() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.installed(), interrupts.caught():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupts.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_ctrl_c_while_something_is_imported(tmp_path: Path) -> None:
    """jax's libraries make an ImportError of it, or crash, which a module that catches everything stands for."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
        "except BaseException as error:\n    raise ImportError('initialization failed') from error\n"
    )
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from m1jax.errors import main_guard\nmain_guard(lambda: __import__('slow'))()"
    )
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(errors.__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_no_command_imports_jax_before_it_handles_ctrl_c() -> None:
    names = ("convert", "evaluate", "export", "generate", "plan", "serve", "train.__main__")
    code = (
        f"import sys, importlib\nfor n in {names}: importlib.import_module('m1jax.' + n)\nprint('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_a_broken_pipe_ends_quietly(model: Path) -> None:
    child = process(model, "--prompt", "x", "--max-tokens", 200, "--seed", 1)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 141
    child.stderr.close()


def test_a_killed_batch_continues(model: Path, run: Run, tmp_path: Path) -> None:
    """Killed without warning once its first lines are there; the final file equals that of an undisturbed run."""
    lines = [{"prompt": f"number {i}", "max_tokens": 20 + 6 * i} for i in range(24)]
    source, out, whole = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    flags = ("--batch-size", 2, "--input", source, "--output")
    child = process(model, *flags, out, stderr=subprocess.DEVNULL)
    while not (out.exists() and out.stat().st_size) and child.poll() is None:
        time.sleep(0.005)
    child.kill()
    child.communicate()
    before = out.read_bytes().count(b"\n")
    assert run(*flags, out).code == 0 and run(*flags, whole).code == 0
    assert out.read_bytes() == whole.read_bytes() and before < 24
