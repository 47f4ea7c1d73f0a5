"""python scripts/train_nano.py --machine cpu|gpu [--out runs/nano] [--until sft] [--scale 1.0] [--steps sft=4000] …

Makes M1-nano from nothing but this repository: tokenizer, synthesized data, lists to recall, pretraining, SFT with
chain of thought, sharper queries, CISPO in two stages, and the weights between those after the two. Killed at any
moment, the same command goes on. After SFT and each step from there it is evaluated on held-out problems;
OUT/results.json and OUT/results.md say what came out, how long it took and on what. `--install` puts the model, in
bfloat16 and the official layout, where the package ships it from. `--scale` shortens every stage, to try things out,
`--steps` gives one another length: a shorter SFT leaves RL more to do.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from m1jax.errors import UserError, main_guard
from m1jax.evaluate import Score, open_local, score
from m1jax.nano.recipe import LONGEST, TAUGHT
from m1jax.nano.training import (
    CHANGES,
    JUDGED,
    PLANS,
    REINFORCED,
    STAGES,
    STEPS,
    WINDOWS,
    Step,
    change,
    claim,
    fingerprint,
    install,
    model_of,
    prepare,
    scaled,
    settings,
)
from m1jax.rl import stage as rl_stage
from m1jax.runtime import use_compilation_cache
from m1jax.tasks import find
from m1jax.train import supervised


def accuracies(model: Path, tasks: Sequence[str], problems: int) -> dict[str, Score]:
    """Of each task, also at the difficulty that SFT taught, and of needles in lists eight times as long as trained."""
    local, chosen = open_local(model, "float32", WINDOWS[-1], 128), find(tasks)
    levels = [(task.name, task, task.difficulty) for task in chosen]
    for name, task, shipped in levels[:]:
        if name in TAUGHT:
            levels.append((f"{name}, difficulty {TAUGHT[name]} in place of {shipped}", task, TAUGHT[name]))
        if name == "retrieval":
            levels += [(f"{name}, {items} items", task, items - 1) for items in (128, 512, 8 * LONGEST)]
    return {name: score(task, task.problems(problems, 0, level), level, local) for name, task, level in levels}


def make(step: Step, out: Path, plan: dict[str, Any], tasks: Sequence[str]) -> None:
    """Does a step, unless its model is there."""
    if model_of(step, out).exists():
        return
    if step in CHANGES:
        change(step, out)
    else:
        (rl_stage.run if step in REINFORCED else supervised.run)(settings(step, out, plan, tasks))


def results(step: Step, out: Path, tasks: Sequence[str], problems: int) -> dict[str, Any]:
    """What a finished step came to."""
    found: dict[str, Any] = {"machine": f"{jax.devices()[0].device_kind}, {platform.machine()}"}
    if step not in CHANGES:
        rows = [json.loads(line) for line in (out / step / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found |= {
            "steps": rows[-1]["step"],
            "loss": rows[-1]["loss"],
            "tokens": sum(row["tokens"] for row in rows),
            "minutes": sum(row["seconds"] for row in rows) / 60,  # without evaluation and saving
        }
    if step in JUDGED:
        scores = accuracies(model_of(step, out), tasks, problems)
        found["accuracy"] = {name: [score.accuracy, *score.interval] for name, score in scores.items()}
    return found


def _length(text: str) -> tuple[str, int]:
    """Reads "sft=4000"."""
    stage, _, count = text.partition("=")
    if stage not in STAGES or not count.isdecimal() or int(count) < 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=N, a stage of {', '.join(STAGES)} and 4 steps or more")
    return stage, int(count)


def table(found: dict[str, Any]) -> str:
    """The results for the README: what each stage took, and how accurate the models are."""
    lines = ["| | steps | tokens | loss | minutes | machine |", "|---|---|---|---|---|---|"]
    form = "| {} | {steps} | {tokens} | {loss:.4f} | {minutes:.1f} | {machine} |"
    lines += [form.format(step, **values) for step, values in found.items() if "steps" in values]
    models = {step: values["accuracy"] for step, values in found.items() if "accuracy" in values}
    if models:
        lines += ["", f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
        for task in next(iter(models.values())):
            cells = ["{:.1%} ({:.1%} to {:.1%})".format(*scores[task]) for scores in models.values()]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@main_guard
def main() -> None:
    """Every stage that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=PLANS, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", action="append", type=_length, default=[], metavar="STAGE=N", help="of one stage")
    parser.add_argument("--task", action="append", metavar="NAME", help="train on these alone (all)")
    parser.add_argument("--problems", type=int, default=400, help="per task, of the evaluations (400)")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    if args.problems < 1 or not 0 < args.scale < math.inf:
        raise UserError("--problems must be 1 or more, --scale a number above 0")
    use_compilation_cache()
    plan, tasks = scaled(PLANS[args.machine], args.scale), args.task or ["all"]
    plan["steps"] |= dict(args.steps)
    claim(args.out, {"machine": args.machine, "scale": args.scale, "tasks": tasks, "recipe": fingerprint(plan)})
    prepare(args.out, plan, tasks)
    file = args.out / "results.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for step in STEPS[: STEPS.index(args.until) + 1]:
        if step in found:
            continue
        make(step, args.out, plan, tasks)
        found[step] = results(step, args.out, tasks, args.problems)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (args.out / "results.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    if args.install:
        install(model_of(args.until, args.out), args.out / "tokenizer")


if __name__ == "__main__":
    main()
