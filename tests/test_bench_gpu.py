"""The GPU benchmark's dry run: all of its code, at tiny shapes, with the kernels in the interpreter."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import api as experts
from m1jax.kernels.lightning_attention import api as lightning
from m1jax.kernels.linear import api as linear
from m1jax.kernels.softmax_attention import api as softmax

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(
    "stages",
    [
        ("check", "fla"),
        ("forward", "backward", "decode", "linear", "softmax"),
        ("experts", "experts-decode"),
        ("sweep", "model"),
    ],
)
def test_dry_run(tmp_path: Path, stages: tuple[str, ...]) -> None:
    file = tmp_path / "out.json"
    done = bench("--dry-run", "--out", str(file), "--only", *stages)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(file.read_text())
    assert report["dry"] and {row["stage"] for row in report["rows"]} == set(stages)
    assert {row["stage"] for row in report["rows"] if "skipped" in row} <= {"fla"}
    assert all(row["us"] > 0 for row in report["rows"] if "us" in row and "operation" not in row)
    assert not any(row.get("wrong") for row in report["rows"])
    table = file.with_suffix(".md").read_text()
    assert "A dry run" in table and all(f"## {stage}" in table for stage in stages)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for held in ('{"rows": []}', "[]"):
        (tmp_path / "out.json").write_text(held)
        done = bench("--dry-run", "--out", str(tmp_path / "out.json"), "--only", "linear")
        assert done.returncode == 2 and "out.json holds something else than results" in done.stderr
        assert (tmp_path / "out.json").read_text() == held


def test_a_kernel_that_fails_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_bench.report import Report  # pyright: ignore[reportMissingImports]

    report = Report(tmp_path / "out.json", False, "NVIDIA H200")

    def outcome(stage: str, error: Exception, must: float | None) -> str:
        report.stage = stage
        with report.attempt(f"{error}", must):
            raise error
        row = report.rows[-1]
        assert ("skipped" in row) != (row.get("wrong") is True and "failed" in row)
        assert report.failures()[-1:] == [f"{stage}: {error}"] * (not report.rows[-1].get("skipped"))
        return "skipped" if "skipped" in row else "wrong"

    memory = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")
    tiles = RuntimeError("INTERNAL: Shared memory size limit exceeded")
    for stage, error, want, *must in [
        ("check", ImportError("no fla"), "skipped"),
        ("check", RuntimeError("INTERNAL: an illegal memory access was encountered"), "wrong"),
        ("check", memory, "wrong"),
        ("decode", memory, "skipped"),
        ("decode", memory, "wrong", 5e-6),
        ("decode", MemoryError("host"), "skipped"),
        ("decode", ValueError("implementation: 'triton' cannot run"), "wrong"),
        ("decode", AssertionError("in the compiler"), "wrong"),
        ("decode", tiles, "wrong"),
        ("sweep", tiles, "skipped"),
    ]:
        report.rows.clear()
        assert outcome(stage, error, *must or [None]) == want, (stage, error)
    report.device = "NVIDIA H100 80GB HBM3"  # of which nothing is required
    assert outcome("decode", memory, 5e-6) == "skipped" and report.bandwidth < 3.35e12
    report.timed("decode", 1e-3, must=5e-6)
    assert "reached" not in report.rows[-1]


def test_a_kernel_that_gives_nan_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_bench import correctness  # pyright: ignore[reportMissingImports]
    from gpu_bench.report import Report  # pyright: ignore[reportMissingImports]

    report, ones = Report(tmp_path / "out.json", False, "NVIDIA H200"), np.ones(4)
    report.stage = "check"
    for broken in range(3):
        got = [ones * np.nan if n == broken else ones for n in range(2)]
        correctness._compare(report, f"{broken}", "bfloat16", got, [ones, ones])
    assert [row["wrong"] for row in report.rows] == [True, True, False]


def test_what_broke_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies and one that is too slow are rows, and what they had written is kept."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_bench import workers  # pyright: ignore[reportMissingImports]
    from gpu_bench.report import Report  # pyright: ignore[reportMissingImports]

    file, report = tmp_path / "rows.json", Report(tmp_path / "out.json", False, "NVIDIA H200")
    file.write_text('{"rows": [{"stage": "decode", "what": "triton decode", "us": 2.0}]}')
    earlier = {"stage": "decode", "us": 9.0, "earlier": "2026-01-01", "wrong": True}
    ends = "print('ready', flush=True); input(); raise SystemExit('no such layer')"
    for code, how in ((ends, "exit code 1: no such layer"), ("import time; time.sleep(60)", "out of time")):
        report.rows[:] = [earlier | {"what": what} for what in ("triton decode", "xla decode")]
        worker = workers._worker("decode", [sys.executable, "-c", code], file)
        assert worker.ready.wait(30 if "ready" in code else 1) == ("ready" in code)
        worker.go()
        workers._wait(worker, time.monotonic() + (30 if "ready" in code else 0))
        workers._collect(report, worker)
        found = {row["what"]: row for row in report.rows}
        assert [row["us"] for row in report.rows[:2]] == [9.0, 2.0], "what was not measured anew is kept"
        assert found["the whole stage"]["failed"].startswith(how) and report.failures() == ["decode: the whole stage"]
        report.forget_earlier()
        assert len(report.rows) == 3
    report.rows[2] = earlier | {"stage": "model", "what": "prefill"}  # nothing broke off
    report.forget_earlier()
    assert [row["us"] for row in report.rows] == [2.0, 9.0], "of a stage that did not run, all is kept"
    report.rows.pop()
    report.rows += [{"stage": "decode", "what": "triton forward", "skipped": "no memory"}]
    report.rows += [{"stage": "fla", "what": f"chunk_simple_gla {case}", "us": 6.0} for case in ("forward", "decode")]
    workers._compare(report)
    assert report.rows[-1]["ours_is_faster"] == 3.0
    assert sum("ours_is_faster" in row for row in report.rows) == 1


def test_launching_does_not_count_for_fla_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of milliseconds on which a call takes 0.04, and 0.15 more where the device waits for its launch."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_bench import fla  # pyright: ignore[reportMissingImports]

    now, idle = 0.0, True

    def call() -> None:
        nonlocal now, idle
        now, idle = now + 0.04 + 0.15 * idle, False

    def synchronize() -> None:
        nonlocal idle
        idle = True

    class Event:
        at = 0.0

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    cuda = types.SimpleNamespace(Event=Event, synchronize=synchronize)
    monkeypatch.setattr(fla, "_torch", lambda: types.SimpleNamespace(cuda=cuda))
    assert fla._seconds(call) == pytest.approx(0.04e-3, rel=0.03)


def test_every_comparison_can_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stage `check` asks for is nothing that an op would refuse on an H200."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_bench import correctness  # pyright: ignore[reportMissingImports]
    from gpu_bench.report import Report  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(softmax.gpu, "capability", lambda: 90)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (softmax.gpu, lightning, experts, linear):
        monkeypatch.setattr(module, "refusal", lambda: None)
    asked = set()
    for op, name, case in correctness.comparisons(Report(tmp_path / "out.json", False, "NVIDIA H200")):
        a = case.abstract()
        if op == "softmax":
            assert softmax._choose(name, a["q"], a["k"], a.get("offset"), a.get("segments")) == name
        elif op == "experts":
            assert experts._choose(name, a["gate_up"], a["down"]) == name
        elif op == "linear":
            assert linear._choose(name, a["x"], a["stack"]) == name
        else:
            assert lightning._choose(name, a["qkv"], "segments" in a, jnp.asarray([-0.5])) == name
        asked.add((name, case.dtype, case.whole))
    assert {(name, whole) for name, _, whole in asked} >= {("triton", True), ("cudnn", True), ("triton", False)}
    assert ("triton", "float32", False) in asked and ("cudnn", "bfloat16", False) in asked


def test_bad_use(tmp_path: Path) -> None:
    done = bench("--dry-run", "--only", "everything", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2 and "no stage everything" in done.stderr
    file = tmp_path / "gpu.json"
    file.write_text('{"device": "NVIDIA H200", "dry": false, "rows": []}')
    done = bench("--dry-run", "--only", "check", "--out", str(file))
    assert done.returncode == 2 and "NVIDIA H200" in done.stderr
