"""python scripts/compare_policy_losses.py [--model DIR] [--out runs/compare] [--steps 12] [--seeds 5] [--task counting]

CISPO, DAPO and GRPO from the same checkpoint: same problems, same sampling, same optimizer, several seeds each. Without
flags it is the README's comparison: M1-nano as it ships, which has counted in words of up to 9 letters, goes on to 12.
Writes OUT/compare.csv (held-out accuracy by loss, seed and step), OUT/compare.png (mean and range over the seeds) and
OUT/compare.md (accuracy at the end, after how many steps each first reached DAPO's final accuracy, which CISPO does in
half the steps in the paper, and the share of tokens whose ratio lay outside the loss's bounds: without any, DAPO and
GRPO are the same). Killed at any moment, the same command goes on.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m1jax.errors import UserError, main_guard
from m1jax.nano import default_model
from m1jax.nano.training import BALANCE, LENGTH, claim
from m1jax.rl import stage
from m1jax.runtime import use_compilation_cache
from m1jax.train.settings import Settings, parse

LOSSES = ("cispo", "dapo", "grpo")
Curves = dict[str, np.ndarray]  # of each loss, accuracy [seeds, evaluations]


def settings(loss: str, seed: int, args: argparse.Namespace) -> Settings:
    """One run; nothing but the loss and the seed differs."""
    rl = {
        "loss": loss,
        "tasks": args.task,
        "difficulty": args.difficulty,
        "questions": args.questions,
        "replies": args.replies,
        "updates": args.updates,
        "attempts": 3,
        "windows": [args.window],
        "row_tokens": LENGTH,
        "evaluate_every": args.every,
        "evaluate_problems": args.problems,
    }
    return parse(
        Settings,
        {
            "stage": "rl",
            "out": str(args.out / f"{loss}-{seed}"),
            "steps": args.steps,
            "seed": seed,
            "model": {"path": str(args.model), "dtype": "float32", "remat": "none"},
            "optimizer": {"learning_rate": args.rate, **BALANCE, "warmup": 0, "weight_decay": 0.0},
            "checkpoint": {"every": 10},
            "guard": {"action": "skip"},
            "log": {"tensorboard": False},
            "rl": rl,
        },
    )


def curve(out: Path) -> tuple[list[int], list[float]]:
    """Steps at which a run was evaluated, and its mean accuracy over the tasks there."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    return [step for step, _ in found], [accuracy for _, accuracy in found]


def outside(out: Path) -> float:
    """Share of a run's tokens whose ratio lay outside the bounds, over all its steps with updates."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(np.mean([row["outside"] for row in rows if "outside" in row]))


def draw(steps: list[int], curves: Curves, file: Path) -> None:
    """Accuracy against step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for loss, values in curves.items():
        axes.plot(steps, values.mean(axis=0), label=loss.upper(), linewidth=1.5)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2)
    axes.set_xlabel("generation batches")
    axes.set_ylabel("greedy accuracy on held-out problems")
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and range of {len(next(iter(curves.values())))} seeds")
    figure.savefig(file, dpi=150)


def table(steps: list[int], curves: Curves, clipped: dict[str, float]) -> str:
    """Accuracy at the end, the first evaluation at which the mean reached DAPO's last, and what `outside` says."""
    goal = curves["dapo"].mean(axis=0)[-1]
    lines = [
        "| | final accuracy, mean (lowest to highest) | steps to DAPO's final accuracy | tokens outside the bounds |",
        "|---|---|---|---|",
    ]
    for loss, values in curves.items():
        reached = next((step for step, a in zip(steps, values.mean(axis=0), strict=True) if a >= goal), None)
        last = values[:, -1]
        when = "not reached" if reached is None else str(reached)
        shown = f"{last.mean():.1%} ({last.min():.1%} to {last.max():.1%})"
        lines.append(f"| {loss.upper()} | {shown} | {when} | {clipped[loss]:.4%} |")
    return "\n".join(lines) + "\n"


@main_guard
def main() -> None:
    """All runs that are not there yet, then the figure and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="what they begin with, e.g. runs/nano/sft/model (what ships)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--steps", type=int, default=12, help="generation batches of a run (12)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each loss (5)")
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations (2)")
    parser.add_argument("--problems", type=int, default=200, help="per task and evaluation (200)")
    parser.add_argument("--questions", type=int, default=32, help="of a generation batch (32)")
    parser.add_argument("--replies", type=int, default=8, help="to each question (8)")
    parser.add_argument("--updates", type=int, default=16, help="on each generation batch (16, as in the paper)")
    parser.add_argument("--window", type=int, default=160, help="tokens of a reply (160)")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate (5e-5)")
    parser.add_argument("--task", action="append", metavar="NAME", help="one or more tasks, or all (counting)")
    parser.add_argument("--difficulty", type=float, default=1.33, help="as a fraction of the shipped one (1.33)")
    args = parser.parse_args()
    for name in ("steps", "seeds", "every", "problems"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be 1 or more")
    args.model, args.task = args.model or default_model(), args.task or ["counting"]
    use_compilation_cache()
    same = {name: getattr(args, name) for name in vars(args) if name not in ("model", "out", "seeds")}
    claim(args.out, {"model": str(args.model), **same})
    for seed in range(args.seeds):
        for loss in LOSSES:
            if not (args.out / f"{loss}-{seed}" / "model").exists():
                stage.run(settings(loss, seed, args))
    found = {(loss, seed): curve(args.out / f"{loss}-{seed}") for loss in LOSSES for seed in range(args.seeds)}
    steps = found[LOSSES[0], 0][0]
    curves = {loss: np.asarray([found[loss, seed][1] for seed in range(args.seeds)]) for loss in LOSSES}
    with (args.out / "compare.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["loss", "seed", "step", "accuracy"])
        writer.writerows(
            (loss, seed, *point) for (loss, seed), run in found.items() for point in zip(*run, strict=True)
        )
    draw(steps, curves, args.out / "compare.png")
    clipped = {
        loss: float(np.mean([outside(args.out / f"{loss}-{seed}") for seed in range(args.seeds)])) for loss in LOSSES
    }
    (args.out / "compare.md").write_text(table(steps, curves, clipped), encoding="utf-8")
    print(table(steps, curves, clipped))


if __name__ == "__main__":
    main()
