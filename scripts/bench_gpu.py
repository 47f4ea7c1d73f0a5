"""python scripts/bench_gpu.py [--only STAGE ...] [--dry-run] [--out FILE.json]

Checks and times everything on one GPU: the kernels against the reference, lightning attention forward, backward and
decode beside fla's `chunk_simple_gla` and plain XLA, the experts' grouped products and their decode in bfloat16, int8
and int4, softmax attention, other tile sizes, and eight layers of M1 at full width. Beside each time stand its floor
(bytes over 4.3 TB/s, or FLOP over 989 TFLOP/s) and what it must reach on an H200.

Stages: check, forward, backward, decode, experts, experts-decode, softmax, sweep, model. Each writes FILE.json and the
table FILE.md when it ends; stages run before, into the same file, are kept. fla's rows need torch and
flash-linear-attention; where these are not, a row says so. --dry-run runs all of it at tiny shapes on the CPU.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from gpu_bench import attention, correctness, mixture, slice, timing
from gpu_bench.report import WHOLE_STAGE, Report

from m1jax.errors import UserError, main_guard

RESULTS = Path(__file__).parent / "results"


def stages(report: Report) -> dict[str, Callable[[], None]]:
    """The stages by name, in the order in which they run."""
    dry = report.dry
    heads, mix = (attention.DRY, mixture.DRY) if dry else (attention.M1, mixture.M1)

    def sweep() -> None:
        attention.sweep(report, heads)
        mixture.sweep(report, mix)

    return {
        "check": lambda: correctness.check(report, heads, mix),
        "forward": lambda: attention.forward(report, heads),
        "backward": lambda: attention.backward(report, heads),
        "decode": lambda: attention.decode(report, heads),
        "experts": lambda: mixture.prefill(report, mix),
        "experts-decode": lambda: mixture.decode(report, mix),
        "softmax": lambda: attention.softmax(report, heads),
        "sweep": sweep,
        "model": lambda: slice.run(report, slice.sizes(dry)),
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
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (scripts/results/DEVICE.json)")
    args = parser.parse_args()
    if args.dry_run:
        jax.config.update("jax_platforms", "cpu")
        timing.ROUNDS = 1
    elif jax.default_backend() != "gpu":
        raise UserError("this machine has no GPU that jax can use: --dry-run runs the script without one")
    device = jax.devices()[0].device_kind
    out = args.out or RESULTS / f"{device.lower().replace(' ', '_')}.json"
    report = Report(out, args.dry_run)
    known = stages(report)
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
