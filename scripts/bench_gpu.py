"""python scripts/bench_gpu.py [--only STAGE ...] [--dry-run] [--out FILE.json]

Checks and times everything on one GPU: the kernels against the reference, lightning attention forward, backward and
decode beside fla's kernels and plain XLA, the experts' grouped products and their decode in bfloat16, int8 and int4,
softmax attention, other tile sizes, and eight layers of M1 at full width. Shapes are those of `cases.py` of each op.
Beside each time stand its floor (bytes over 4.3 TB/s, 3.0 on an H100, or FLOP over 989 TFLOP/s) and, on an H200, what
it must reach.

Stages: check, forward, backward, decode, experts, experts-decode, softmax, sweep, model. Each writes FILE.json and the
table FILE.md when it ends; stages run before, into the same file, are kept. fla's rows need torch and
flash-linear-attention; where these are not, a row says so. --dry-run runs all of it at small shapes on the CPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from gpu_bench import attention, correctness, fla, mixture, slice, timing
from gpu_bench.report import WHOLE_STAGE, Report

from m1jax.errors import UserError, main_guard
from m1jax.kernels.lightning_attention.cases import CASES

RESULTS = Path(__file__).parent / "results"


def stages(report: Report, baseline: fla.Times) -> dict[str, Callable[[], None]]:
    """The stages by name, in the order in which they run."""

    def sweep() -> None:
        attention.sweep(report)
        mixture.sweep(report)

    return {
        "check": lambda: correctness.check(report),
        **dict.fromkeys(("forward", "backward", "decode"), lambda: attention.lightning(report, baseline)),
        "experts": lambda: mixture.prefill(report),
        "experts-decode": lambda: mixture.decode(report),
        "softmax": lambda: attention.softmax(report),
        "sweep": sweep,
        "model": lambda: slice.run(report, slice.sizes(report.dry)),
    }


def earlier(path: Path, device: str, dry: bool, again: list[str]) -> list[dict]:
    """Rows of other stages that the file holds already, if they are of this device."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["device"] != device or found["dry"] != dry:
        raise UserError(f"{path} holds results of {found['device']}: choose another file")
    return [row for row in found["rows"] if row["stage"] not in again]


@main_guard
def main() -> int:
    """The command line; exit code 1 if a kernel is wrong or fails, other than for memory, or a stage broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (scripts/results/DEVICE.json)")
    args = parser.parse_args()
    baseline: fla.Times = {}
    if args.dry_run:
        jax.config.update("jax_platforms", "cpu")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        timing.ROUNDS = 1
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")  # by default JAX takes three quarters
        named = args.only or ("forward", "backward")
        baseline = fla.measure(case for case in CASES if attention.stage_of(case) in named)
        if jax.default_backend() != "gpu":
            raise UserError("this machine has no GPU that jax can use: --dry-run runs the script without one")
    device = jax.devices()[0].device_kind
    out = args.out or RESULTS / f"{device.lower().replace(' ', '_')}.json"
    report = Report(out, args.dry_run, device)
    known = stages(report, baseline)
    chosen = args.only or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"no stage {', '.join(unknown)}: known are {', '.join(known)}")
    report.rows += earlier(out, device, args.dry_run, chosen)
    for name in chosen:
        report.stage = name
        with report.attempt(WHOLE_STAGE):
            known[name]()
        report.write()
    if wrong := report.failures():
        print(f"failed: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    main()
