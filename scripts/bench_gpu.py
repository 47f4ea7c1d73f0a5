"""python scripts/bench_gpu.py [--only STAGE ...] [--dry-run] [--out FILE.json] [--minutes M]

Checks and times everything on one GPU: the kernels against the reference, lightning attention forward, backward and
decode beside plain XLA and fla's kernels, a decode step's projections, the experts' grouped products and their decode
in bfloat16, int8 and int4, softmax attention, other tile sizes, and eight layers of M1 at full width. Shapes are those
of `cases.py` of each op. Beside each time stand its floor (bytes over 4.3 TB/s, 3.0 on an H100, or FLOP over 989
TFLOP/s) and, on an H200, what it must reach.

Each stage runs in processes of its own, which compile beside each other and then measure one after the other.
FILE.json and the table FILE.md are written when a stage ends. What is in the file already stays until it is measured
again, marked as of an earlier run. fla's rows need torch and flash-linear-attention; where these are not, a row says
so. --dry-run runs all of it at small shapes on the CPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
from gpu_bench import stages, workers
from gpu_bench.report import Report

from m1jax.errors import UserError, main_guard

RESULTS = Path(__file__).parent / "results"


def earlier(path: Path, device: str, dry: bool) -> list[dict]:
    """Rows that the file holds already, if they are of this device."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"device", "dry", "rows"} <= set(found):
        raise UserError(f"{path} holds something else than results of this script: choose another file")
    if found["device"] != device or found["dry"] != dry:
        raise UserError(f"{path} holds results of {found['device']}: choose another file")
    return [row | {"earlier": row.get("earlier", found["date"])} for row in found["rows"]]


@main_guard
def main() -> int:
    """The command line; exit code 1 if a kernel is wrong or fails, other than for memory, or a stage broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"these stages, of {', '.join(stages.PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (scripts/results/DEVICE.json; dry_run.json for --dry-run)")
    parser.add_argument("--minutes", type=float, default=60, help="end after so long, with what is measured by then")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)  # Mosaic's interpreter needs a thread for each of its warp groups
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    else:
        os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": ".95"}
        if jax.default_backend() != "gpu":
            raise UserError("this machine has no GPU that jax can use: --dry-run runs the script without one")
    device = jax.devices()[0].device_kind
    if args.worker:
        stages.work(args.worker, Report(args.out, args.dry_run, device))
        return 0
    out = args.out or RESULTS / f"{'dry_run' if args.dry_run else device.lower().replace(' ', '_')}.json"
    chosen = args.only or list(stages.PARTS)
    if unknown := [name for name in chosen if name not in stages.PARTS]:
        raise UserError(f"no stage {', '.join(unknown)}: known are {', '.join(stages.PARTS)}")
    report = Report(out, args.dry_run, device, earlier(out, device, args.dry_run))
    workers.run(report, chosen, args.minutes)
    if wrong := report.failures():
        print(f"failed: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    main()
