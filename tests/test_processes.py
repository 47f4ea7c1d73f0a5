"""Several processes, as on several machines: loading, saving, generating, and the loss of one of them."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import m1jax
from m1jax import distributed
from m1jax.errors import UserError
from m1jax.generate import main as generate
from m1jax.lora.adapter import open_adapter
from m1jax.lora.factors import Lora
from m1jax.params import flatten
from m1jax.rendezvous import meet
from m1jax.rl import stage
from m1jax.train import supervised
from m1jax.train.__main__ import main as train
from tests import test_rl, training
from tests.checkpoints import random_tensors, write_checkpoint
from tests.generation_fixtures import tiny_config, write_model
from tests.tools import DATA, SMALL, rms_error, variant

CONFIG = variant(vocab_size=64, num_key_value_heads=4, num_local_experts=8)
ROOT = Path(__file__).parents[1]
LIMIT = 400  # seconds


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def address() -> Iterator[str]:
    """A free port on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield f"127.0.0.1:{port}"


def run(address: str, count: int, module: str, args: Sequence[str]) -> list[Ended]:
    """Runs a module in so many processes; `{index}` in its arguments is each one's own number."""
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *(arg.format(index=i, count=count, address=address) for arg in args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | training.CACHED,
        )
        for i in range(count)
    ]
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() - start < LIMIT:
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    texts = [process.communicate() for process in processes]
    return [Ended(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def work(address: str, count: int, devices: int, task: str, *args: object) -> list[Ended]:
    """Runs a task of `tests.process_worker`."""
    return run(
        address, count, "tests.process_worker", [task, "{address}", "{count}", "{index}", str(devices), *map(str, args)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("processes") / "m", CONFIG, random_tensors(CONFIG, ("bfloat16",)))


def test_saved_by_four_processes_loaded_by_two_and_by_one(folder: Path, tmp_path: Path, address: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ended = work(address, 4, 2, "copy", folder, first, "expert=2,tensor=4", "float32")
    assert [e.code for e in ended] == [0] * 4, ended
    assert "process 0 of 4 has saved" in ended[0].out
    assert [(e.out, e.err) for e in ended[1:]] == [("", "")] * 3  # only process 0 prints
    ended = work(address, 2, 2, "copy", first, second, "data=1,expert=4,tensor=1", "bfloat16")
    assert [e.code for e in ended] == [0] * 2, ended
    assert not list(tmp_path.glob("*.partial"))
    source, copy = flatten(m1jax.load(folder)), flatten(m1jax.load(second, mesh="data=2,expert=2,tensor=2"))
    for name, value in source.items():
        np.testing.assert_array_equal(np.asarray(copy[name]), np.asarray(value), err_msg=name)


def test_an_adapter_that_two_processes_hold(tmp_path: Path, address: str) -> None:
    ended = work(address, 2, 1, "adapt", tmp_path / "adapter")
    assert [e.code for e in ended] == [0] * 2, ended
    lora = Lora.of(SMALL, 2, 2.0, ("*",))
    found = flatten(open_adapter(tmp_path / "adapter", SMALL).factors(lora, SMALL))
    for path, value in flatten(lora.init(SMALL, jax.random.key(0))).items():
        np.testing.assert_allclose(found[path], value, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_ends_the_others_and_is_named(address: str, victim: int) -> None:
    """By jax's coordination service, and before each would give up by itself, `errors.VERDICT` after the exchange."""
    ended = work(address, 4, 2, "die", victim)
    assert ended[victim].code == -signal.SIGKILL
    # The coordinator reports whose heartbeats are missing; without one, the connection to it is lost.
    named = f"unhealthy (stopped sending heartbeats):\n{victim}\n" if victim else "the leader task was preempted/died"
    for i, other in enumerate(ended):
        if i != victim:
            assert other.code == -signal.SIGABRT and named in other.err, other


def several(address: str, count: int, command: str, *args: object) -> list[Ended]:
    """Runs one of the commands in so many processes."""
    flags = ["--coordinator", "{address}", "--num-processes", "{count}", "--process-id", "{index}"]
    return run(address, count, f"m1jax.{command}", [*map(str, args), *flags])


def test_one_process_converts_and_plans(folder: Path, tmp_path: Path, address: str) -> None:
    ended = several(address, 2, "convert", folder, tmp_path / "converted")
    assert [e.code for e in ended] == [0, 0], ended
    assert "complete" in ended[0].out and (ended[1].out, ended[1].err) == ("", "")
    assert m1jax.load(tmp_path / "converted").config == CONFIG
    ended = several(address, 2, "plan", "--config", folder, "--devices", "4xH200", "--context", "64")
    assert [e.code for e in ended] == [0, 0], ended
    assert "parameters" in ended[0].out and ended[1].out == ""


def test_an_error_of_one_process_ends_the_others(address: str) -> None:
    ended = work(address, 2, 1, "bad", "")
    assert ended[1].code == 2 and ended[1].err == "error: process 1: this machine lacks the file\n"
    assert ended[0].code == -signal.SIGABRT and "unhealthy (stopped sending heartbeats):\n1\n" in ended[0].err, ended


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "message"),
    [
        (None, 4, None, "go with --coordinator"),
        ("auto", None, 0, "go with --coordinator"),
        ("here", 4, 0, "expected HOST:PORT or auto"),
        ("here:1", None, 0, "needs --num-processes and --process-id"),
        ("here:1", 4, 4, "--process-id 4 must be 0 … 3"),
        ("here:99999", 2, 0, "a port is a number from 1 to 65535"),
    ],
)
def test_bad_flags(coordinator: str | None, count: int | None, index: int | None, message: str) -> None:
    args = argparse.Namespace(coordinator=coordinator, num_processes=count, process_id=index)
    with pytest.raises(UserError, match=message):
        distributed.check(args)


def meeting(*arrivals: tuple[str, int, int]) -> list[str]:
    """What each of these processes (address, how many there are, which one it is) is told: "" where it may go on."""

    def arrive(arrival: tuple[str, int, int]) -> str:
        try:
            meet(*arrival, seconds=10 if arrival[2] else 1)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(arrivals)) as pool:
        return list(pool.map(arrive, arrivals))


def test_processes_wait_for_each_other(address: str) -> None:
    port = address.rpartition(":")[2]
    assert meeting(*((address, 4, i) for i in (3, 1, 0, 2))) == [""] * 4
    assert meeting((address, 1, 0)) == [""]
    first, other = meeting((address, 4, 0), (address, 4, 2))
    assert first == f"of 4 processes these did not come to {address} in time: 1, 3"
    assert other == f"process 0 at {address} sent this one away: it says why, or two have the same number"
    assert meeting((address, 2, 0), (address, 3, 2))[0] == "process 2 says that there are 3 processes, process 0 that 2"
    with socket.create_server(("", int(port))):
        assert meeting((address, 2, 0))[0].startswith(f"process 0 cannot listen at port {port} (Address already in use")


def test_a_process_that_waits_in_vain_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT", 0.3)
    with pytest.raises(UserError, match=r"did not come to .* in time: 1$"):
        distributed.start(argparse.Namespace(coordinator=address, num_processes=2, process_id=0))
    with pytest.raises(UserError, match=r"process 0 did not answer at .* in time \(Connection refused\)"):
        distributed.start(argparse.Namespace(coordinator=address, num_processes=2, process_id=1))


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2"])
def test_generates_the_same_text_as_one_process(
    address: str, mesh: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", DATA / "m1_hello", "--greedy", "--prompt", "Who are you?", "--max-tokens", "12"]
    with pytest.raises(SystemExit) as exit:
        generate([str(option) for option in options])
    assert exit.value.code == 0
    alone = capsys.readouterr().out
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    ended = several(address, 4, "generate", *options, "--mesh", mesh)
    assert [e.code for e in ended] == [0] * 4, ended
    assert ended[0].out == alone and len(alone) > 10
    assert [(e.out, e.err) for e in ended[1:]] == [("", "")] * 3


def test_a_file_of_lines_is_continued(tmp_path: Path, address: str) -> None:
    """By two processes, of which the second sees neither the output nor these files of weights; and a NaN is named."""
    lines = [json.dumps({"prompt": f"Who are you {i}?", "max_tokens": 3}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1], num_key_value_heads=2)
    for i in range(2):
        write_model(tmp_path / f"m{i}", config)
        os.utime(tmp_path / f"m{i}" / "model.safetensors", (i, i))
        (tmp_path / f"disk{i}").mkdir()

    def options(index: object) -> list[str]:
        files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / f"disk{index}" / "out.jsonl"]
        return [*map(str, files), "--model", str(tmp_path / f"m{index}"), "--batch-size", "1"]

    out = tmp_path / "disk0" / "out.jsonl"
    with pytest.raises(SystemExit) as exit:
        generate(options(0))
    assert exit.value.code == 0
    whole = out.read_bytes()
    out.write_bytes(whole.splitlines(keepends=True)[2] + b'{"line": 1, "sam')
    for _ in range(2):  # the second time nothing is left
        ended = several(address, 2, "generate", *options("{index}"), "--mesh", "tensor=2")
        assert [e.code for e in ended] == [0, 0] and out.read_bytes() == whole, ended
    assert not list((tmp_path / "disk1").iterdir())
    for i in range(2):
        file = tmp_path / f"m{i}" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = np.nan
        save_file(tensors, file, {"format": "pt"})
    ended = several(address, 2, "generate", "--model", tmp_path / "m{index}", "--prompt", "Hi", "--mesh", "tensor=2")
    assert ended[0].code == 2 and "first in layer 1 (softmax): its weights are damaged" in ended[0].err, ended


def test_trains_as_one_process(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of one process with two devices, bit by bit; one process writes, any loads.

    The run is split by rows, of which each process reads its own, and computes in bfloat16. A signal to one process
    ends both after the same step. Then it goes on split by heads, where each reads all, in float32.
    """
    path = training.write_corpus(tmp_path)
    shutil.copy(path / "corpus.jsonl", path / "held.jsonl")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    training.on_two_devices(monkeypatch)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    common: dict[str, Any] = {
        "data": {"validation": [str(path / "held.jsonl")], "validate_every": 2, "streams": 2},
        "checkpoint": {"every": 1000},
        "optimizer": {"decay": 0},
    }

    def run_shared(**changes: Any) -> list[Ended]:
        file = training.write_toml(training.toml(path, shared, **common, **changes), tmp_path / "shared.toml")
        return several(address, 2, "train", "--config", file)

    by_rows: dict[str, Any] = {"mesh": "fsdp=2", "model": {"dtype": "bfloat16"}}
    with ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(run_shared, steps=100_000, **by_rows)
        while not (shared / "metrics.jsonl").exists() or len(training.rows(shared)) < 3:
            assert not interrupted.done(), interrupted.result()
            time.sleep(0.05)
        (second,) = children_with("--process-id", "1")
        os.kill(second, signal.SIGTERM)
        ended = interrupted.result()
    done = len(training.rows(shared))
    assert [e.code for e in ended] == [130, 130], ended
    assert f"the same command goes on from step {done}" in ended[0].err

    by_heads: dict[str, Any] = {"steps": done + 2, "mesh": "tensor=2"}
    ended = run_shared(**by_heads)
    assert [e.code for e in ended] == [0, 0], ended
    assert "complete" in ended[0].out and ended[1].out == ""
    assert f"going on from step {done} of {done + 2}" in ended[0].err
    for changes in ({"steps": done, **by_rows}, by_heads):
        supervised.run(training.settings(path, alone, **common, **changes))
    assert [step for step, *_ in training.losses(shared)] == list(range(1, done + 3))
    assert training.losses(shared) == training.losses(alone)
    ours, theirs = (flatten(m1jax.load(out / "model")) for out in (shared, alone))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (shared / "model" / "tokenizer.json").exists() and (shared / "curves.png").exists()
    for ours, theirs in zip(*map(training.rows, (shared, alone)), strict=True):
        # A signal in step `done` goes before its evaluation, which the run that goes on then does, in float32.
        if ours["step"] % 2 == 0 and ours["step"] != done:
            assert ours["validation_loss"] == theirs["validation_loss"]
    assert (done % 2 == 0) == ("validation_loss" in training.rows(shared)[done - 1])


def children_with(*arguments: str) -> list[int]:
    """Processes that this one has started with these arguments."""
    own = [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
    lines = {child: Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in own}
    return [child for child, line in lines.items() if " ".join(arguments) in " ".join(line)]


def test_reinforces_as_one_process(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies, rewards and losses of one process with one device, which also goes on from there; one writes."""
    evaluated: dict[str, Any] = {"evaluate_every": 1, "evaluate_problems": 6}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    stage.run(test_rl.settings(alone, 2, **evaluated))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    file = training.write_toml(test_rl.table(shared, 1, **evaluated) | {"mesh": "fsdp=2"}, tmp_path / "shared.toml")
    ended = several(address, 2, "train", "--config", file)
    assert [e.code for e in ended] == [0, 0], ended
    assert "complete" in ended[0].out and ended[1].out == ""
    m1jax.load(shared / "model")
    stage.run(test_rl.settings(shared, 2, **evaluated))
    for ours, theirs in zip(test_rl.rows(shared), test_rl.rows(alone), strict=True):
        for name in ("reward", "reply_tokens", "groups", "informative", "held_out"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "entropy", "ratio", "gradient_norm", "correlation_logp"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    weights = [flatten(m1jax.load(out / "model")) for out in (shared, alone)]
    assert all(rms_error(weights[0][name], weights[1][name]) < 1e-4 for name in weights[0])


def test_processes_that_do_not_do_the_same_are_told(tmp_path: Path, address: str) -> None:
    """Other settings, or a task that draws by the hash of a string, which every process has its own of."""
    task = "Task('own', 1, lambda rng, d: {'n': hash(str(rng.random()))}, ('{n}?',), lambda i: Solution('a', 'b'))"
    (tmp_path / "own.py").write_text(f"from m1jax.tasks import Solution, Task\nTASK = {task}\n")
    tables = [test_rl.table(tmp_path / "out", 1, tasks=[str(tmp_path / "own.py")]) for _ in range(2)]
    for seed, message in ((7, "another settings or data than"), (0, "another draw of problems, which the seed alone")):
        for i, table in enumerate(tables):
            training.write_toml(table | {"mesh": "fsdp=2", "seed": seed * i}, tmp_path / f"{i}.toml")
        ended = several(address, 2, "train", "--config", tmp_path / "{index}.toml")
        assert all(e.code == 2 for e in ended) and message in ended[0].err, ended


@pytest.mark.parametrize(("given", "mesh"), [([], "fsdp=2"), (["--mesh", "auto"], "auto")])
def test_a_mesh_on_the_command_line_overrules_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], mesh: str
) -> None:
    path, found = tmp_path / "a.toml", []
    path.write_text('stage = "pretrain"\nout = "x"\nsteps = 1\nmesh = "fsdp=2"\nmodel.config = "m"\n')
    monkeypatch.setattr("m1jax.train.supervised.run", lambda settings, profile: found.append(settings.mesh))
    with pytest.raises(SystemExit) as exit:
        train(["--config", str(path), *given])
    assert exit.value.code == 0 and found == [mesh]
