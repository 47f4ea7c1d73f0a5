"""python scripts/rollout_agreement.py [--model DIR] [--dtype bfloat16] [--steps 3] [--no-replay]

How well the log-probabilities of rollout and of training agree, as stage rl reports it every step: Pearson's
correlation on half of the replies of 64 questions with 4 each, for all tasks mixed and for some alone, at two
temperatures. Prints a table of the lowest and highest of so many steps. Nothing is learnt: the learning rate is next to
nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from m1jax.errors import UserError, main_guard
from m1jax.nano import default_model
from m1jax.nano.training import LENGTH, WINDOWS
from m1jax.rl import stage
from m1jax.runtime import use_compilation_cache
from m1jax.train.settings import Settings, parse

QUESTIONS, REPLIES = 64, 4
MIXED = "all"
ALONE = ("cipher", "sorting", "addition", "retrieval")
TEMPERATURES = (1.5, 1.0)


def correlations(args: argparse.Namespace, task: str, temperature: float, out: Path) -> list[float]:
    """The correlation of each step's first update."""
    rl: dict[str, Any] = {
        "tasks": [task],
        "temperature": temperature,
        "questions": QUESTIONS,
        "replies": REPLIES,
        "updates": 2,
        "windows": [WINDOWS[-1]],
        "row_tokens": LENGTH,
        "dynamic_sampling": False,
        "replay_routes": not args.no_replay,
    }
    table = {
        "stage": "rl",
        "out": str(out),
        "steps": args.steps,
        "model": {"path": str(args.model or default_model()), "dtype": args.dtype, "remat": "none"},
        "optimizer": {"learning_rate": 1e-30, "warmup": 0, "weight_decay": 0.0},
        "checkpoint": {"every": args.steps},
        "log": {"tensorboard": False},
        "rl": rl,
    }
    stage.run(parse(Settings, table))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["correlation_logp"] for line in lines]


@main_guard
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the model that comes with the package")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-replay", action="store_true", help="updates choose experts anew")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError("--steps must be 1 or more")
    use_compilation_cache()
    lines = [f"| {args.dtype} | temperature | lowest | highest |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for temperature in TEMPERATURES:
            for task in (MIXED, *ALONE):
                found = correlations(args, task, temperature, Path(folder) / f"{task}-{temperature}")
                lines.append(f"| {task} | {temperature} | {min(found):.6f} | {max(found):.6f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
