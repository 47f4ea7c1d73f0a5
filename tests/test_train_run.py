"""Whole runs of `python -m m1jax.train`: killed and continued, stopped by a signal, by NaN, by a full disk."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

import m1jax
from m1jax.errors import UserError
from m1jax.exporting import export
from m1jax.model import build
from m1jax.params import flatten
from m1jax.saving import save
from m1jax.tokenizer import Tokenizer
from m1jax.train import guard, loop, saving, step, supervised
from m1jax.train.parts import fresh, prepare
from m1jax.workplace import LOCK, alone
from tests.tools import HELLO, rms_error
from tests.training import (
    CONFIG,
    ENVIRONMENT,
    events,
    interrupted,
    losses,
    on_two_devices,
    rows,
    settings,
    toml,
    write_corpus,
    write_toml,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nobody interrupted."""
    out = folder / "whole"
    supervised.run(settings(folder, out, log={"tensorboard": True}))
    return out


def test_a_run_leaves_metrics_curves_and_a_model_that_loads(whole: Path, tmp_path: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert found[-1]["loss"] < found[0]["loss"]
    for row in found:
        assert row["good"] == 1 and row["dropped"] == 0 and row["load_max"] >= 1 >= row["load_min"]
        load = np.asarray(row["load"])
        assert load.shape == (2, 4) and np.allclose(load.mean(1), 1, atol=1e-5)
        assert 0 < row["router_entropy_mean"] <= np.log(4) and row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(row["cross_entropy"] + CONFIG.router_aux_loss_coef * row["balance"], 1e-5)
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    version, *steps = events(whole)
    assert version.file_version == "brain.Event:2"
    told = {(event.step, value.tag): value.simple_value for event in steps for value in event.summary.value}
    numbers = {(row["step"], name): x for row in found for name, x in row.items() if np.ndim(x) == 0 and name != "step"}
    assert told == {key: np.float32(x) for key, x in numbers.items()}
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["6", "8"]
    model = m1jax.load(whole / "model")
    assert Tokenizer.load(whole / "model").encode("1 + 1") and model.config == CONFIG
    export(whole / "model", tmp_path / "official")
    back = m1jax.load(tmp_path / "official")
    for path, leaf in flatten(back).items():
        assert np.array_equal(leaf, flatten(model)[path])


def test_killed_at_any_moment_it_goes_on_bit_by_bit(folder: Path, whole: Path) -> None:
    """A process of its own, killed while it writes the first checkpoint, and while it writes a later one."""
    out = folder / "killed"
    file = write_toml(toml(folder, out), folder / "killed.toml")
    arguments = [sys.executable, "-m", "m1jax.train", "--config", str(file)]

    def killed_when(reached: Any) -> None:
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not reached() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()

    def found(pattern: str) -> bool:
        return any((out / "checkpoints").glob(pattern))

    killed_when(lambda: found("*tmp*"))
    assert not found("[0-9]")
    killed_when(lambda: found("[0-9]") and found("*tmp*"))
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert losses(out) == losses(whole)
    ours, theirs = (flatten(m1jax.load(p / "model")) for p in (out, whole))
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize("mesh", ["data=2", "seq=2"])
def test_other_devices_give_the_same_losses_up_to_rounding(
    folder: Path, whole: Path, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's checkpoint of step 6, gone on from on two devices."""
    out = folder / mesh
    (out / "checkpoints").mkdir(parents=True)
    subprocess.run(["cp", "-r", str(whole / "checkpoints" / "6"), str(out / "checkpoints")], check=True)
    on_two_devices(monkeypatch)
    supervised.run(settings(folder, out, mesh=mesh))
    assert [row[0] for row in losses(out)] == [7, 8]
    assert rms_error([row[1:] for row in losses(out)], [row[1:] for row in losses(whole)[6:]]) < 1e-5


def test_the_validation_loss_is_that_of_every_document_once(folder: Path, whole: Path, tmp_path: Path) -> None:
    out, texts = tmp_path / "out", [f"{i} times 3 is {3 * i}." for i in range(7)]
    (tmp_path / "validation.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = {"validation": [str(tmp_path / "validation.jsonl")], "validate_every": 3}
    supervised.run(settings(folder, out, data=data))
    assert losses(out) == losses(whole)
    found = {row["step"]: row["validation_loss"] for row in rows(out) if "validation_loss" in row}
    assert list(found) == [3, 6, 8]
    model, tokenizer = m1jax.load(out / "model"), Tokenizer.load(HELLO)
    each = []
    for text in texts:
        tokens = np.asarray([*tokenizer.encode(text), tokenizer.id_of(tokenizer.special["eos_token"])])
        log_p = jax.nn.log_softmax(model(tokens[None, :-1])[0])
        each += np.take_along_axis(np.asarray(log_p), tokens[1:, None], axis=1)[:, 0].tolist()
    assert found[8] == pytest.approx(-np.mean(each), rel=1e-5)


def test_auto_takes_all_devices(folder: Path, tmp_path: Path) -> None:
    parts = prepare(settings(folder, tmp_path / "out", mesh="auto"))
    assert parts.mesh.size == jax.device_count() > 1


def after(number: int, then: Any) -> Any:
    """A step of `supervised.Supervised` that does something else when step `number`, counted from 1, begins."""
    original = supervised.Supervised.step

    def step(self: supervised.Supervised, state: Any, index: int, report: Any) -> Any:
        if index + 1 == number:
            then(self)
        return original(self, state, index, report)

    return step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_leaves_a_checkpoint(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Between two regular ones; the run goes on from it bit by bit."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    once = settings(folder, tmp_path / "out", checkpoint={"every": 100})
    with monkeypatch.context() as patch:
        patch.setattr(supervised.Supervised, "step", after(3, lambda _: signal.raise_signal(number)))
        with pytest.raises(KeyboardInterrupt):
            supervised.run(once)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["3"]
    supervised.run(once)
    assert losses(tmp_path / "out") == losses(whole)


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_in_an_evaluation_ends_the_run_after_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Without one more step; also in the evaluation that a run begins with which was killed there."""
    (tmp_path / "validation.jsonl").write_text('{"text": "This one is fine."}\n')
    held = {"validation": [str(tmp_path / "validation.jsonl")], "validate_every": 2}
    once, original = settings(folder, tmp_path / "out", data=held), supervised.Supervised.evaluate

    def hears(self: supervised.Supervised, state: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(self, state)

    for evaluate in [interrupted, hears] if again else [hears]:
        monkeypatch.setattr(supervised.Supervised, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            supervised.run(once)
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2] and "validation_loss" in rows(tmp_path / "out")[-1]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["2"]


def test_the_guard_leaves_a_checkpoint_of_the_state_before_the_bad_step(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a batch of the fourth step is spoilt once; gone on from, the run is the one that nothing happened to."""

    def spoil(stage: supervised.Supervised) -> None:
        step = stage._step

        def bad(state: Any, batch: Any, **beside: Any) -> Any:
            stage._step = step
            weights = batch["weights"]
            return step(state, batch | {"weights": jax.device_put(weights * jnp.nan, weights.sharding)}, **beside)

        stage._step = bad

    once = settings(folder, tmp_path / "out", checkpoint={"every": 100})
    with monkeypatch.context() as patch:
        patch.setattr(supervised.Supervised, "step", after(4, spoil))
        with pytest.raises(UserError, match=r"step 4: .* the weights are as before"):
            supervised.run(once)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["3"]
    supervised.run(once)
    assert losses(tmp_path / "out") == losses(whole)


def spoilt(folder: Path, path: str) -> Path:
    """A model with a NaN in one parameter."""
    dst = folder / f"spoilt {path}"
    if not dst.exists():
        model = build(CONFIG, lambda _, spec: jnp.full(spec.shape, 0.1))
        arrays = flatten(model)
        arrays[path] = arrays[path].at[-1].set(jnp.nan)
        save(build(CONFIG, lambda name, _: arrays[name]), dst, "float32", HELLO)
    return dst


def test_nan_stops_the_run_and_names_the_layer(folder: Path, tmp_path: Path) -> None:
    model = {"config": "", "path": str(spoilt(folder, "softmax.o_proj"))}
    with pytest.raises(UserError, match=r"step 1: NaN or infinity first appears in layer 1 \(softmax\); the weights"):
        supervised.run(settings(folder, tmp_path / "out", model=model))
    assert not any((tmp_path / "out" / "checkpoints").iterdir()) and not (tmp_path / "out" / "model").exists()


def test_skipped_steps_are_named_until_there_are_too_many(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"config": "", "path": str(spoilt(folder, "softmax.o_proj"))}
    guard = {"action": "skip", "skips": 3}
    with pytest.raises(UserError, match=r"step 3: .* that makes 3 in a row"):
        supervised.run(settings(folder, tmp_path / "out", model=model, guard=guard))
    text = capsys.readouterr().err
    assert (
        text.count("the step is skipped") == 2
        and "step 3" not in text.replace("step 3/8", "")
        and "layer 1 (softmax)" in text
    )
    assert [row["good"] for row in rows(tmp_path / "out")] == [0, 0, 0]


def test_a_spike_is_told_with_its_limit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "CALM", 2)
    step.make_step.cache_clear()
    low: dict[str, Any] = {"optimizer": {"learning_rate": 0.3, "warmup": 0, "decay": 0}, "guard": {"spike": 1e-3}}
    with pytest.raises(
        UserError, match=r"the loss \d+\.\d+ is a spike, above \d+\.\d+, the limit by guard.spike = 0.001"
    ):
        supervised.run(settings(folder, tmp_path / "out", **low))
    step.make_step.cache_clear()
    assert "loss_limit" not in rows(tmp_path / "out")[0]


def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes on, and ends with exit code 2 if the last checkpoint is missing."""
    out, full = tmp_path / "out", {4, 8}
    original = saving.Checkpoints.save

    def save(self: saving.Checkpoints, step: int, state: Any, position: Any) -> str | None:
        with monkeypatch.context() as patch:
            if step in full:
                patch.setattr(saving, "check_space", no_room)
            return original(self, step, state, position)

    def no_room(folder: Path, needed: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(saving.Checkpoints, "save", save)
    with pytest.raises(UserError, match=r"step 8 was not written .No space left on device.: the last good one is.* 6"):
        supervised.run(settings(folder, out))
    assert "warning: the checkpoint of step 4 was not written" in capsys.readouterr().err
    assert losses(out) == losses(whole)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["2", "6"]
    full.clear()
    supervised.run(settings(folder, out))
    assert losses(out) == losses(whole)


def test_a_full_disk_while_drawing_keeps_the_model(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: Any, file: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", no_room)
        with pytest.raises(UserError, match=r"curves.png.*: No space left on device: make room, then run again"):
            supervised.run(settings(folder, out))
    ours, theirs = (flatten(m1jax.load(p / "model")) for p in (out, whole))
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    supervised.run(settings(folder, out))
    assert losses(out) == losses(whole) and (out / "curves.png").exists()


def test_a_checkpoint_of_another_model_or_of_other_data_is_refused(folder: Path, whole: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.replace(CONFIG, hidden_size=32).to_official()))
    with pytest.raises(UserError, match="was written with hidden_size 16, not 32: choose another out"):
        supervised.run(settings(folder, whole, model={"config": str(config)}))
    with pytest.raises(UserError, match=r"was written with data.length 24, not 32"):
        supervised.run(settings(folder, whole, data={"length": 32}))
    with pytest.raises(UserError, match=r"was written with data.bins 4, not 8"):
        supervised.run(settings(folder, whole, data={"bins": 8}))
    with pytest.raises(UserError, match=r"was written with seed 0, not 1"):
        supervised.run(settings(folder, whole, seed=1))
    shutil.copytree(HELLO, tmp_path / "tokenizer")
    table = json.loads((HELLO / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(table | {"model_max_length": 9}))
    with pytest.raises(UserError, match=r"was written with tokenizer '\w{16}', not '\w{16}': choose another out"):
        supervised.run(settings(folder, whole, model={"tokenizer": str(tmp_path / "tokenizer")}))
    text = (folder / "corpus.jsonl").read_text()
    (tmp_path / "corpus.jsonl").write_text(text.replace("1 + 1 = 2", "1 + 1 = 3"))  # name and size are the same
    with pytest.raises(UserError, match=r"was written with data\.contents '\w{16}', not '\w{16}'"):
        supervised.run(settings(folder, whole, data={"files": [str(tmp_path / "corpus.jsonl")]}))


def test_one_run_at_a_time_and_never_backwards(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(whole, whole / LOCK), pytest.raises(UserError, match="is being written by another process: wait"):
        supervised.run(settings(folder, whole))
    before = (whole / "model" / "config.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="is at step 8 of its run already: steps = 2 is less"):
        supervised.run(settings(folder, whole, steps=2, optimizer={"warmup": 0, "decay": 0}))
    assert (whole / "model" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(loop, "fresh", interrupted)
        supervised.run(settings(folder, tmp_path / "out", steps=1, optimizer={"warmup": 2, "decay": 0}))
    assert "warning: optimizer.warmup = 2 is not over when the run is" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(folder: Path, whole: Path, tmp_path: Path) -> None:
    """In a process of its own: Orbax gives up at the first error, and its other reads outlive the call."""
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(whole), str(out)], check=True)
    for file in (out / "checkpoints" / "8").glob("**/d/*"):
        file.write_bytes(b"")
    file = write_toml(toml(folder, out, log={"tensorboard": True}), tmp_path / "a.toml")
    line = [sys.executable, "-m", "m1jax.train", "--config", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "checkpoints/8 cannot be read" in done.stderr and "delete it to go on from the one before" in done.stderr


def test_profile_writes_a_trace(folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the last steps if there are only few; two traces in a row show that the first one was ended."""
    for out in (tmp_path / "first", tmp_path / "second"):
        shutil.copytree(whole / "checkpoints" / "6", out / "checkpoints" / "6")
        supervised.run(settings(folder, out), profile=True)
        assert list((out / "profile").glob("**/*.xplane.pb"))
    supervised.run(settings(folder, out), profile=True)
    assert "no step is left to profile" in capsys.readouterr().err
    found = [loop.profiled(*run) for run in ((0, 9), (2, 20), (0, 6), (3, 7), (3, 5), (3, 3))]
    assert found == [range(3, 6), range(5, 8), range(3, 6), range(4, 7), range(3, 5), range(3, 3)]


def test_the_gradient_that_is_not_finite_is_named(folder: Path) -> None:
    model = fresh(prepare(settings(folder, folder / "unused"))).model

    def loss(model: Any, batch: Any, total: Any) -> Any:
        return jnp.sum(jnp.sqrt(jnp.abs(model.softmax.o_proj[...] - model.softmax.o_proj[...]))), {}

    batch = {name: jnp.ones((1, 2, 4), jnp.int32) for name in ("tokens", "segments")} | {"weights": jnp.ones((1, 2, 4))}
    assert guard.bad_gradients(loss, model, batch) == "softmax.o_proj[0]"
