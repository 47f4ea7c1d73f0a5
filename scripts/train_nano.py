"""python scripts/train_nano.py --machine cpu|gpu [--out runs/nano] [--until sft] [--scale 1.0] [--task all] [--install]

Makes M1-nano from nothing but this repository: tokenizer, synthesized data, lists to recall, pretraining, SFT with
chain of thought, sharper queries, CISPO in two stages, and the weights between those after the two. Killed at any
moment, the same command goes on. After SFT and each step from there it is evaluated on held-out problems;
OUT/results.json and OUT/results.md say what came out, how long it took and on what. `--install` puts the model, in
bfloat16 and the official layout, where the package ships it from. `--scale` shortens every stage, to try things out.
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
    PLANS,
    REINFORCED,
    STAGES,
    WINDOWS,
    claim,
    fingerprint,
    install,
    prepare,
    scaled,
    settings,
    settle,
    sharpen,
)
from m1jax.rl import stage as rl_stage
from m1jax.runtime import use_compilation_cache
from m1jax.tasks import find
from m1jax.train import loop


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


def results(stage: str, out: Path, tasks: Sequence[str], problems: int) -> dict[str, Any]:
    """What a finished stage came to."""
    rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = {stage: f"{stage}/model"} if stage == "sft" or stage in REINFORCED else {}
    judged |= {"sft": {"sharpened": "sharpened"}, STAGES[-1]: {"settled": "settled"}}.get(stage, {})
    scores = {name: accuracies(out / model, tasks, problems) for name, model in judged.items()}
    return {
        "steps": rows[-1]["step"],
        "loss": rows[-1]["loss"],
        "tokens": sum(row["tokens"] for row in rows),
        "minutes": sum(row["seconds"] for row in rows) / 60,  # of the steps, without evaluation and saving
        "accuracy": {
            model: {name: [s.accuracy, *s.interval] for name, s in found.items()} for model, found in scores.items()
        },
        "machine": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    }


def table(found: dict[str, Any]) -> str:
    """The results for the README: what each stage took, and how accurate the models after it are."""
    stages = [stage for stage in STAGES if stage in found]
    lines = ["| | steps | tokens | loss | minutes | machine |", "|---|---|---|---|---|---|"]
    form = "| {} | {steps} | {tokens} | {loss:.4f} | {minutes:.1f} | {machine} |"
    lines += [form.format(stage, **found[stage]) for stage in stages]
    models = {model: scores for stage in stages for model, scores in found[stage]["accuracy"].items()}
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
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--task", action="append", metavar="NAME", help="train on these alone (all)")
    parser.add_argument("--problems", type=int, default=400, help="per task, of the evaluations (400)")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    if args.problems < 1 or not 0 < args.scale < math.inf:
        raise UserError("--problems must be 1 or more, --scale a number above 0")
    use_compilation_cache()
    plan, tasks = scaled(PLANS[args.machine], args.scale), args.task or ["all"]
    claim(args.out, {"machine": args.machine, "scale": args.scale, "tasks": tasks, "recipe": fingerprint(plan)})
    prepare(args.out, plan, tasks)
    file = args.out / "results.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for stage in STAGES[: STAGES.index(args.until) + 1]:
        if stage in found:
            continue
        if not (args.out / stage / "model").exists():
            (rl_stage.run if stage in REINFORCED else loop.run)(settings(stage, args.out, plan, tasks))
        if stage == "sft":
            sharpen(args.out)
        if stage == STAGES[-1]:
            settle(args.out)
        found[stage] = results(stage, args.out, tasks, args.problems)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (args.out / "results.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    if args.install:
        last = args.out / ("settled" if args.until == STAGES[-1] else f"{args.until}/model")
        install(last, args.out / "tokenizer")


if __name__ == "__main__":
    main()
