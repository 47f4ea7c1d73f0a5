"""Compiles steps of the whole released M1 without its hardware; fails where they need more memory than is on record.

    python scripts/compile_full.py                    # for CPUs, and for H200s where jax's CUDA plugin is
    python scripts/compile_full.py --platform cuda    # one compiler only
    python scripts/compile_full.py --platform cuda --write    # puts today's bytes on record

A case is a decode step (128k of context), a chunk of a prompt (8192 tokens) or a training step, on 8, 64 and 512
devices; on 8 also a step that trains factors beside int8 experts. CPU checks the bytes of arguments, which are exact;
an H200 those of temporaries as well.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from m1jax.errors import UserError, main_guard
from m1jax.presets import find_config
from m1jax.sharding import compiling
from m1jax.sharding.machines import DEVICES
from m1jax.sharding.mesh import MeshShape
from m1jax.sharding.plan import arguments
from m1jax.sharding.steps import Workload

RECORD = Path(__file__).parent / "results" / "full_size.json"
SERVE = {8: MeshShape(expert=8), 64: MeshShape(expert=8, tensor=8), 512: MeshShape(data=8, expert=8, tensor=8)}
TRAIN = {8: MeshShape(fsdp=1, expert=8), 64: MeshShape(fsdp=8, expert=8), 512: MeshShape(fsdp=8, expert=8, tensor=8)}
SLACK = 1.02  # of temporaries: compilers differ a little between versions


def cases() -> dict[str, tuple[Workload, MeshShape]]:
    """What is compiled, by name."""
    out = {}
    for n in (8, 64, 512):
        experts = "int8" if n == 8 else None
        out[f"decode {n}"] = Workload("serve", n, 131072, quantize=experts), SERVE[n]
        out[f"prefill {n}"] = Workload("prefill", max(1, n // 8), 8192, quantize=experts), SERVE[n]
        out[f"train {n}"] = Workload("train", min(n, 64), 4096), TRAIN[n]
    out["factors 8"] = Workload("train", 8, 8192, quantize="int8", lora_rank=16), TRAIN[8]
    return out


def compile_cases(platform: compiling.Platform, names: list[str]) -> dict[str, dict[str, int]]:
    """Bytes of arguments and temporaries on each device, by case."""
    compiling.prepare(platform, 512)
    config, out = find_config("m1-80k"), {}
    for name in names:
        work, mesh = cases()[name]
        found = compiling.compile_step(config, work, mesh, platform, DEVICES["H200"])
        counted = arguments(config, work, mesh, 0).arguments
        # Tokens, lengths and the optimiser's counters come on top of what the plan counts.
        if not 0 <= found.arguments - counted <= 1 << 20:
            raise UserError(f"{name}: the plan counts {counted} bytes of arguments, {platform} {found.arguments}")
        out[name] = {"arguments": found.arguments, "temporaries": found.temporaries}
        sizes = f"{found.arguments / 1e9:.2f} GB arguments, {found.temporaries / 1e9:.2f} GB temporaries"
        print(f"{platform} {name}: {sizes}, {found.seconds:.0f} s", file=sys.stderr, flush=True)
    return out


def check(found: dict[str, dict[str, int]], record: dict[str, dict[str, int]], platform: str) -> list[str]:
    """What has grown. Raises `UserError` if a case is not on record."""
    missing = [name for name in found if name not in record]
    if missing:
        raise UserError(f"not on record: {', '.join(missing)}: put them there with --platform cuda --write")
    slack = {"arguments": 1.0} if platform == "cpu" else {"arguments": 1.0, "temporaries": SLACK}
    return [
        f"{platform} {name}: {kind} {sizes[kind]} bytes, {record[name][kind]} on record"
        for name, sizes in found.items()
        for kind in slack
        if sizes[kind] > slack[kind] * record[name][kind]
    ]


@main_guard
def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python scripts/compile_full.py", description="Compiles the whole M1.")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="one compiler only (those that are installed)")
    parser.add_argument("--write", action="store_true", help="put the bytes on record")
    parser.add_argument("--case", action="append", choices=cases(), help="one case only (repeatable)")
    args = parser.parse_args()
    if args.write and args.platform != "cuda":
        raise UserError("--write goes with --platform cuda: a CPU's temporaries say nothing of an H200's")
    if args.platform is None:  # a process can be set up for one platform
        try:
            compiling.check_backend("cuda")
            platforms = ["cpu", "cuda"]
        except UserError as error:
            print(f"only arguments are checked: {error}", file=sys.stderr)
            platforms = ["cpu"]
        for platform in platforms:
            child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--platform", platform], check=False)
            if child.returncode:  # it has said why
                return child.returncode
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    found = compile_cases(args.platform, args.case or list(cases()))
    if args.write:
        RECORD.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")
        return 0
    grown = check(found, record, args.platform)
    if grown:
        raise UserError("needs more memory than on record: " + "; ".join(grown) + ": if it must be, --write")
    return 0


if __name__ == "__main__":
    main()
