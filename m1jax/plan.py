"""Plans a model on a machine that need not be there: memory, traffic, FLOPs and the time they take at least.

    python -m m1jax.plan --config m1-80k --devices 8xH200 --quantize int8 --context 131072 --batch 8
    python -m m1jax.plan --config m1-80k --devices 512xH800 --mode train --context 8192 --batch 512
    python -m m1jax.plan --config DIR --devices 64xH200 --sweep

Bytes of parameters and states are exact, from the shapes of the shards; temporaries are an estimate unless --compile
asks the compiler. Times are the data sheet's: nothing is faster, most things are slower.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m1jax import distributed
from m1jax.arguments import Parser
from m1jax.errors import UserError, main_guard

if TYPE_CHECKING:
    from m1jax.config import M1Config
    from m1jax.sharding.machines import Device
    from m1jax.sharding.mesh import MeshShape
    from m1jax.sharding.plan import Plan
    from m1jax.sharding.steps import Workload

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT = {"serve": 131072, "prefill": 131072, "train": 8192}


def parser() -> Parser:
    """The command line."""
    out = Parser(prog="python -m m1jax.plan", description=__doc__)
    add = out.add_argument
    add("--config", required=True, metavar="MODEL", help="m1-80k, a model's folder or its config.json")
    add(
        "--devices",
        required=True,
        metavar="8xH200",
        help="how many of which: A100, H100, H800, H200, B200, v5e, v5p, v6e",
    )
    add("--mode", choices=("serve", "prefill", "train"), default="serve", help="decode, read prompts, or train (serve)")
    add("--mesh", metavar="AXES", help="e.g. data=1,expert=8,tensor=1 (auto: chosen for the devices)")
    add("--batch", type=int, metavar="B", help="rows of all devices together (as few as the mesh takes)")
    add("--context", type=int, metavar="N", help="tokens of a row (131072; 8192 in training)")
    add("--chunk", type=int, default=8192, metavar="T", help="tokens of a prompt read at once in prefill (8192)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="compute in (bfloat16)")
    add("--quantize", choices=("int8", "int4"), help="what the experts are stored in")
    add("--lora-rank", type=int, default=0, metavar="R", help="train factors of this rank beside the model ([lora])")
    add("--compile", choices=("cpu", "cuda", "tpu"), help="ask this compiler for its memory; needs no device")
    add("--sweep", action="store_true", help="the best mesh for each number of such devices")
    add("--json", action="store_true", help="print one JSON object")
    distributed.add_arguments(out)
    return out


def check(args: argparse.Namespace) -> None:
    """Raises `UserError` for values that contradict each other."""
    wrong = [
        (
            args.mode == "train" and args.quantize and not args.lora_rank,
            "--quantize is for serving, and for factors beside a model (--lora-rank): training keeps float32 weights",
        ),
        (args.mode != "train" and args.lora_rank, "--lora-rank goes with --mode train"),
        (args.lora_rank < 0, f"lora-rank must be 1 or more, or 0, not {args.lora_rank}"),
        (args.sweep and args.mesh, "--sweep chooses the mesh: drop --mesh"),
        (args.sweep and args.compile, "--sweep compiles nothing: drop --compile"),
        (args.batch is not None and args.batch < 1, f"batch must be 1 or more, not {args.batch}"),
        (args.context is not None and args.context < 1, f"context must be 1 or more, not {args.context}"),
        (args.chunk < 1, f"chunk must be 1 or more, not {args.chunk}"),
    ]
    for bad, message in wrong:
        if bad:
            raise UserError(message)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; see `python -m m1jax.plan --help`."""
    args = parser().parse_args(argv)
    check(args)
    distributed.check(args)
    # Importing jax takes seconds; bad arguments come before.
    from m1jax.presets import find_config
    from m1jax.sharding import compiling
    from m1jax.sharding.machines import parse_devices
    from m1jax.sharding.plan import best, compiled_plan, make_plan
    from m1jax.sharding.steps import Workload

    config = find_config(args.config)
    count, device = parse_devices(args.devices)
    compiling.prepare(args.compile or "cpu", count if args.compile else 1)
    if not distributed.is_first(args):
        return
    context = args.context or min(CONTEXT[args.mode], config.max_position_embeddings)
    if context > config.max_position_embeddings:
        raise UserError(f"context {context} exceeds the model's {config.max_position_embeddings} tokens")
    work = Workload(args.mode, args.batch, context, args.chunk, args.dtype, args.quantize, args.lora_rank)
    if args.sweep:
        plans = {n: best(config, work, n, device) for n in sorted({*COUNTS, count}) if n <= count}
        values = [{"devices": n} | (describe(plan) if plan else {"fits": False}) for n, plan in plans.items()]
        _print(args, values, sweep_table(plans))
        return
    mesh = _mesh(config, args.mesh, count, device, work)
    plan = make_plan(config, work, mesh, device)
    if args.compile:
        compiled = compiling.compile_step(config, plan.work, mesh, args.compile, device)
        plan = compiled_plan(config, plan, compiled.temporaries, args.compile)
    _print(args, describe(plan), report(plan, args.config))


def _mesh(config: "M1Config", text: str | None, count: int, device: "Device", work: "Workload") -> "MeshShape":
    from m1jax.sharding.mesh import MeshShape, choose
    from m1jax.sharding.plan import best, check_rows

    if text in (None, "auto"):
        shape = choose(config, count, work.use, device.memory / 1e9, work.quantize)
        if work.batch is None:
            return shape
        try:
            check_rows(work, shape)
        except UserError:  # the usual mesh does not split so few rows: another may
            other = best(config, work, count, device)
            if other is None:
                raise
            return other.mesh
        return shape
    shape = MeshShape.parse(text)
    if shape.size != count:
        raise UserError(f"mesh {shape} has {shape.size} devices, --devices says {count}: make them agree")
    return shape


def _print(args: argparse.Namespace, values: Any, text: str) -> None:
    print(json.dumps(values, indent=1) if args.json else text, flush=True)


def describe(plan: "Plan") -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, FLOPs."""
    from m1jax.sharding.plan import Traffic

    def traffic(t: Traffic) -> dict[str, Any]:
        return {**t.collective._asdict(), "times": t.times, "sent": t.sent, "between_nodes": t.between_nodes}

    memory = plan.memory
    return {
        "mesh": dataclasses.asdict(plan.mesh),
        "device": plan.device.name,
        **dataclasses.asdict(plan.work),
        "memory": {**dataclasses.asdict(memory), "arguments": memory.arguments, "total": memory.total},
        "fits": plan.fits,
        "sure": plan.sure,
        "largest_batch": plan.largest_batch,
        "longest_context": plan.longest_context,
        "collectives": [traffic(t) for t in plan.traffic],
        "flops": plan.flops,
        "roofline": {**dataclasses.asdict(plan.roofline), "bound": plan.roofline.bound},
        "seconds": plan.roofline.seconds,
        "tokens_per_second": plan.tokens_per_second,
    }


def _doubt(plan: "Plan") -> str:
    """What to do where an estimate does not decide whether a plan fits."""
    if plan.sure:
        return ""
    platform, (least, most) = plan.device.platform, plan.off
    return (
        f" by the estimate, but compilers have needed {least:g} to {most:g} times the temporaries estimated: "
        f"--compile {platform} decides"
    )


def report(plan: "Plan", name: str) -> str:
    """The plan as text."""
    work, roof = plan.work, plan.roofline
    stored = f"{work.dtype}, experts {work.quantize}" if work.quantize else work.dtype
    size = f"{work.batch} rows of {work.context} tokens" + f", {work.tokens} at once" * (work.mode == "prefill")
    what = stored
    if work.mode == "train":
        what = f"factors of rank {work.lora_rank} beside " if work.lora_rank else "float32 with Adam, computing in "
        what += stored
    how = f"by estimates in proportion to the {plan.memory.compiled} compiler's figure" if plan.memory.compiled else ""
    lines = [
        f"{name} on {plan.mesh.size} × {plan.device.name}, mesh {plan.mesh}: {work.mode}, {size}, {what}",
        "",
        "GB on each device",
        *_table(_memory_rows(plan)),
        ("it fits" if plan.fits else "IT DOES NOT FIT") + _doubt(plan),
        f"largest batch at this context: {plan.largest_batch or 'none'}; "
        f"longest context at this batch: {plan.longest_context or 'none'}" + f" ({how})" * bool(how),
        "",
        "Collectives of a step, on each device",
        *_table(_traffic_rows(plan)),
        "",
        f"{plan.flops:.4g} FLOP a step, {plan.flops / plan.mesh.size:.4g} on each device",
        f"At least {_ms(roof.seconds)} ms a step, bound by {roof.bound} (arithmetic {_ms(roof.arithmetic)}, memory "
        f"{_ms(roof.memory)}, links {_ms(roof.links)}): at most {plan.tokens_per_second:.0f} tokens/s",
    ]
    return "\n".join(lines)


def _memory_rows(plan: "Plan") -> list[tuple[str, str]]:
    memory = plan.memory
    how = f"{memory.compiled} compiler" if memory.compiled else "estimate"
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "cache": memory.cache,
        "lightning states": memory.state,
        f"temporaries ({how})": memory.temporaries,
        f"together, of {plan.device.memory / 1e9:.0f}": memory.total,
    }
    return [(name, _gb(size)) for name, size in parts.items() if size]


def _traffic_rows(plan: "Plan") -> list[tuple[str, ...]]:
    rows = [("", "axes", "times", "MB each", "GB sent", "over")]
    for t in plan.traffic:
        axes, over = "×".join(t.collective.axes), "network" if t.between_nodes else "links"
        numbers = f"{t.times:.0f}", f"{t.collective.nbytes / 1e6:.3f}", f"{t.sent / 1e9:.3f}"
        rows.append((t.collective.kind, axes, *numbers, over))
    return rows if plan.traffic else [("none",)]


def sweep_table(plans: Mapping[int, "Plan | None"]) -> str:
    """One line for each number of devices; None is where nothing fits."""
    head = ("devices", "mesh", "batch", "GB", "largest batch", "longest context", "ms", "bound by", "tokens/s")
    rows: list[tuple[str, ...]] = [head]
    for count, p in plans.items():
        if p is None:
            rows.append((str(count), "does not fit", *7 * ("",)))
            continue
        limits = str(p.largest_batch), str(p.longest_context)
        speed = _ms(p.roofline.seconds), p.roofline.bound, f"{p.tokens_per_second:.0f}"
        rows.append((str(count), str(p.mesh), str(p.work.batch), _gb(p.memory.total), *limits, *speed))
    return "\n".join(_table(rows))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return ["  " + line(row) for row in rows]


if __name__ == "__main__":
    main()
