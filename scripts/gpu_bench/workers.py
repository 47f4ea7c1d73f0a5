"""Runs the stages' parts as processes, which compile beside each other and then measure one after the other."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu_bench.report import WHOLE_STAGE, Report
from gpu_bench.stages import PARTS, parts_of
from gpu_bench.turns import READY

OURS = "triton", "mosaic"  # as the names of forms begin
LONG = "forward-long", "backward-long"
COMPILING = 0.4  # of the time, at most, before the first measures
SCRIPT = Path(__file__).parents[1] / "bench_gpu.py"
# XLA would try hundreds of Triton kernels for each product of its own, which takes minutes: cuBLAS it is.
FLAGS = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass
class Worker:
    """A process for a part of a stage; `file` is where it writes its rows; `late`: it was ended for being too slow."""

    stage: str
    process: subprocess.Popen[str]
    file: Path
    ready: threading.Event
    reader: threading.Thread | None = None
    late: bool = False

    def pass_on(self) -> None:
        """Prints what the process prints, until it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.strip() == READY:
                self.ready.set()
            else:
                print(line, end="", flush=True)
        self.ready.set()

    def go(self) -> None:
        """Gives it its turn."""
        assert self.process.stdin
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended, and its rows or its exit code say why
            pass


def run(report: Report, chosen: list[str], minutes: float) -> None:
    """Fills the report with the rows of the chosen stages, in the order of `PARTS`, at the end those of long rows.

    Those have the device's memory to themselves, of which every process that waits for its turn holds some.
    """
    end = time.monotonic() + 60 * minutes
    for stages in ([s for s in chosen if s not in LONG], *([s] for s in LONG if s in chosen)):
        _run(report, stages, end)
    report.forget_earlier()
    report.write()


def _run(report: Report, stages: list[str], end: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = _start(report, stages, Path(folder))
        try:
            # Nobody measures while another still compiles, if that does not take too long: XLA tries algorithms of its
            # libraries on the device.
            until = time.monotonic() + COMPILING * (end - time.monotonic())
            for worker in found:
                worker.ready.wait(max(0.0, until - time.monotonic()))
                how = "compiled" if worker.ready.is_set() else "still compiles"
                print(f"{worker.stage} {how}, {end - time.monotonic():.0f} s left", flush=True)
            for worker in found:
                worker.ready.wait(max(0.0, end - time.monotonic()))
                print(f"{worker.stage}, {end - time.monotonic():.0f} s left", flush=True)
                worker.go()
                _wait(worker, end)
                _collect(report, worker)
                _compare(report)
                report.write()
        finally:
            for worker in found:
                worker.process.kill()
                worker.process.wait()


def _start(report: Report, chosen: list[str], folder: Path) -> list[Worker]:
    found = []
    for stage in (name for name in PARTS if name in chosen):
        for number in range(parts_of(stage, report.dry)):
            file = folder / f"{stage}-{number}.json"
            command = [sys.executable, str(SCRIPT), "--worker", f"{stage}:{number}", "--out", str(file)]
            found.append(_worker(stage, command + ["--dry-run"] * report.dry, file))
    return found


def _worker(stage: str, command: list[str], file: Path) -> Worker:
    pipe: Any = subprocess.PIPE
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}" + " --xla_gpu_autotune_level=0" * (stage == "check")
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with file.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=SCRIPT.parent, env=env)
    worker = Worker(stage, process, file, threading.Event())
    worker.reader = threading.Thread(target=worker.pass_on, daemon=True)
    worker.reader.start()
    return worker


def _wait(worker: Worker, end: float) -> None:
    try:
        worker.process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        worker.late = True
        worker.process.kill()
        worker.process.wait()
    assert worker.reader and worker.process.stdin and worker.process.stdout
    worker.reader.join()
    worker.process.stdin.close()
    worker.process.stdout.close()


def _collect(report: Report, worker: Worker) -> None:
    if worker.file.exists():
        fresh = json.loads(worker.file.read_text())["rows"]
        report.replace(fresh)
    code = worker.process.returncode
    if code:
        log = worker.file.with_suffix(".log").read_text()
        how = "out of time" if worker.late else f"exit code {code}"
        report.stage = worker.stage
        report.add(WHOLE_STAGE, failed=f"{how}: {' '.join(log.split())[-300:]}", wrong=True)


def _compare(report: Report) -> None:
    """Sets beside each time of another form, the second word on of which names the case, how much faster ours is."""
    now = [row for row in report.rows if "us" in row and "earlier" not in row]
    named = [(row, *row["what"].partition(" ")[::2]) for row in now]
    ours = {case: row["us"] for row, form, case in named if form.startswith(OURS)}
    for row, form, case in named:
        if case in ours and not form.startswith(OURS):
            row["ours_is_faster"] = row["us"] / ours[case]
