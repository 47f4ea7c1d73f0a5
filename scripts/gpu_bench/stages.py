"""The stages by name, and what a worker does: a stage's part compiled, then, when it is its turn, measured."""

from typing import Any

from gpu_bench import attention, correctness, fla, mixture, projections, slice, timing
from gpu_bench.report import WHOLE_STAGE, Report
from gpu_bench.timing import Measurement
from gpu_bench.turns import wait

# Into how many parts a stage is cut, in the order of turns: first what tells most, last what compiles longest or needs
# most of the device's memory, of which every process that waits for its turn holds some.
PARTS = {
    "forward": 1,
    "backward": 1,
    "decode": 1,
    "linear": 1,
    "softmax": 1,
    "experts": 1,
    "experts-decode": 3,
    "check": 5,
    "sweep": 4,
    "fla": 1,
    "model": 2,
    "forward-long": 1,
    "backward-long": 1,
}


def parts_of(stage: str, dry: bool) -> int:
    """Into how many parts a stage is cut; few in a dry run, as a process takes longer to start than to work."""
    return PARTS[stage] if not dry else 2 if stage in ("check", "model") else 1


def work(part: str, report: Report) -> None:
    """Does part "STAGE:NUMBER"."""
    stage, number = part.split(":")
    report.stage, mine = stage, slice_of(int(number), parts_of(stage, report.dry))
    if report.dry:
        timing.ROUNDS = 1
    with report.attempt(WHOLE_STAGE):
        if stage == "check":
            correctness.check(report, mine)
        elif stage == "model":
            _model(report, int(number))
        elif stage == "fla":
            with report.attempt("fla compiled"):
                fla.compile_variants()
            wait()
            fla.run(report)
            with report.attempt("fla against the reference"):
                correctness.check_fla(report)
        else:
            _measure(report, stage, mine)
    report.write()


def slice_of(number: int, parts: int) -> Any:
    """Every so manyth of a list."""
    return lambda items: list(items)[number::parts]


def _measure(report: Report, stage: str, mine: Any) -> None:
    measurements: list[Measurement] = mine(
        {
            "experts": lambda: mixture.prefill(report),
            "experts-decode": lambda: mixture.decode(report),
            "linear": lambda: projections.decode(report),
            "softmax": lambda: attention.softmax(report),
            "sweep": lambda: attention.sweep(report) + mixture.sweep(report),
        }.get(stage, lambda: attention.lightning(report))()
    )
    timing.compile_all(report, measurements)
    wait()
    timing.time_all(report, measurements)


def _model(report: Report, number: int) -> None:
    part = slice.Slice(report, slice.sizes(report.dry), (None, "int8")[number])
    part.compile()
    wait()
    part.run()
