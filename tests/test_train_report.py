"""What a run tells: metrics, console, curves."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import matplotlib.figure
import pytest

from m1jax.train.report import Report, _peak_tflops, curves
from tests.training import CONFIG, ENVIRONMENT, events, rows, settings, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("train"))


def test_the_utilisation_is_flops_over_what_the_devices_can_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(folder, tmp_path, log={"peak_tflops": 0.5})
    clock = iter([100.0, 104.0, 106.0])
    with Report(run, CONFIG, 2, 0) as report, monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        report.resume()
        report.step(0, {"loss": 1.0}, 3000, 10.0)
        report.step(1, {"loss": 1.0}, 3000, 10.0, aside=1.0)
    lightning, softmax, experts, router, norms, head = 5 * 512, 3 * 512, 2 * 2 * 3 * 24 * 16, 2 * 64, 112, 512 * 16
    used = lightning + softmax + experts + router + norms + head  # parameters that a token meets
    flops = 3000 * 3 * (2 * used + 4 * 4 * 8 * 8 + 4 * 4 * 8 * 10)
    first, second = rows(tmp_path)
    assert first["utilisation"] == pytest.approx(flops / (4 * 2 * 0.5e12))
    assert second["utilisation"] == pytest.approx(flops / ((2 - 1) * 2 * 0.5e12)) and second["seconds"] == 2


def test_the_peak_is_that_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    class H100:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [H100])
    assert (_peak_tflops("bfloat16"), _peak_tflops("float32")) == (989.0, 494.5)


def test_figures_that_are_added_never_take_the_step_away(folder: Path, tmp_path: Path) -> None:
    """An evaluation makes the step's line longer; a process that ends before it is written leaves the line."""
    with Report(settings(folder, tmp_path), CONFIG, 1, 0) as report:
        report.step(0, {"loss": 1.0}, 10, 1.0)
        before, stream = rows(tmp_path), report._stream
        report._stream = Mock(wraps=stream, write=Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            report.add({"validation_loss": 2.0})
        assert rows(tmp_path) == before
        report._stream = stream
        report.add({"validation_loss": 3.0})
    assert rows(tmp_path) == [before[0] | {"validation_loss": 3.0}]


def test_the_console_tells_of_evaluations_and_of_the_time_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step of a process compiles: nothing is to be foretold from it."""
    clock = iter([100.0, 170.0, 172.0, 174.0])
    with Report(settings(folder, tmp_path), CONFIG, 1, 2) as report, monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        report.resume()
        report.step(2, {"loss": 1.0}, 700, 10.0)
        report.step(3, {"loss": 1.0, "reward": 0.25, "accuracy": 0.125}, 100, 10.0)
        report.add({"held_out/addition": 0.25, "held_out": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "step 3/8 loss 1.0000, 10 tokens/s left ?",
        "step 4/8 loss 1.0000, reward 0.2500, accuracy 0.1250, 50 tokens/s left 8 s",
        "step 4/8 held_out 0.5000",
    ]


def test_what_a_run_that_goes_on_writes_again_counts_for_tensorboard(folder: Path, tmp_path: Path) -> None:
    run = settings(folder, tmp_path, log={"tensorboard": True})
    for first in (0, 2):
        with Report(run, CONFIG, 1, first) as report:
            for step in range(first, 4):
                report.step(step, {"loss": 1.0}, 10, 1.0)
    found = [(event.step, event.session_log.status, bool(event.summary.value)) for event in events(tmp_path)]
    steps = [(n, 0, True) for n in (1, 2, 3, 4)]
    assert found == [(0, 0, False), *steps, (0, 0, False), (3, 1, False), *steps[2:]]


def test_a_disk_that_fills_up_ends_a_run_at_once(folder: Path, tmp_path: Path) -> None:
    """With a line and nothing else: no thread is left that waits or complains. A limit stands in for the disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from m1jax.errors import main_guard
from m1jax.train.report import Report
from m1jax.workplace import disk_errors
from tests.training import CONFIG, settings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, out = map(Path, sys.argv[1:])

@main_guard
def main():
    with disk_errors(out), Report(settings(folder, out, log={"tensorboard": True}), CONFIG, 1, 0) as report:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for step in range(10_000):
            report.step(step, {f"figure {i}": 1.0 for i in range(20)}, 10, 1.0)

main()
"""
    line = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    error = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert done.returncode == 2 and len(error) == 1 and "make room, then run again: it continues" in error[0]


def test_curves_of_few_points_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file, **_: drawn.append(self) or file.touch())
    lines = [{"step": n, "loss": 1.0 / n} for n in range(1, 9)]
    lines[-1]["validation_loss"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert [axes.lines[0].get_marker() for axes in drawn[0].axes] == ["", "o"]
