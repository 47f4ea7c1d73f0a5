"""The stages that make M1-nano: their data and settings for a CPU and for a GPU, and the form in which it ships."""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from m1jax.errors import UserError
from m1jax.loading import load
from m1jax.model import M1, build
from m1jax.nano import FOLDER, recipe
from m1jax.params import flatten, param_table
from m1jax.saving import save
from m1jax.tasks import Problem, find, mixture
from m1jax.tokenizer import Tokenizer
from m1jax.train.documents import digest
from m1jax.train.settings import Settings, parse
from m1jax.weights import expected

# What makes the model, each from the one before: stages that train, and between them changes of the weights.
Step = Literal["recall", "pretrain", "sft", "sharpened", "longer", "surer", "settled"]
STEPS: tuple[Step, ...] = ("recall", "pretrain", "sft", "sharpened", "longer", "surer", "settled")
CHANGES: tuple[Step, ...] = ("sharpened", "settled")
STAGES: tuple[Step, ...] = tuple(step for step in STEPS if step not in CHANGES)
JUDGED = STEPS[STEPS.index("sft") :]  # the models that speak

LENGTH = 512  # tokens of a row; the longest conversation of the shipped difficulties and lists to recall fit
RECALL = 6  # rows of a stage's own for each list to recall
FOUND = 2  # weight of a number found again: there are few among the tokens of replies
WINDOWS = (136, 160)  # tokens of a reply, in stages of RL
SHARPER = 1.4  # factor of the queries after SFT, so that among eight times as many items one still stands out
# What ships lies between the models after the two stages of RL, this far from the first, its queries sharper once more:
# the second stage makes replies surer and needles in the longest lists harder to find.
KEPT = 0.5
SHARPER_AGAIN = 1.1
# With M1's own 0.001 experts of so few die; each layer's own, or layers come to use few of theirs.
BALANCE = {"balance": 0.01, "balance_over": "layer"}
# How often the tasks that are learnt last come in SFT, in place of once.
OFTEN = {"sorting": 6, "sequence": 2, "multiplication": 2, "cipher": 2}
# The two stages of RL. First what SFT has not shown: what solves it is rare, and among slips it would go unseen. Then
# what SFT leaves unsure and longer words have unlearnt: at temperature 1 replies of so sure a model hardly differ.
REINFORCED: dict[str, dict[str, Any]] = {
    "longer": {"tasks": tuple(recipe.TAUGHT), "temperature": 1.0},
    "surer": {
        "tasks": ("subtraction", "sorting", "counting", "reversal", "cipher", "sequence"),
        "temperature": 1.5,
    },
}

# Of each machine: dtype, rows of a batch, steps and learning rates, passes over the data, what RL does in a step.
PLANS: dict[str, dict[str, Any]] = {
    "cpu": {
        "dtype": "float32",
        "rows": 4,
        "steps": {"recall": 350, "pretrain": 600, "sft": 13000, "longer": 60, "surer": 100},
        "rate": {"recall": 1e-3, "pretrain": 1e-3, "sft": 1e-3, "longer": 1e-4, "surer": 1e-4},
        "passes": 1,
        # 16 updates of so few replies are noise. What ships was made when a batch of few groups had four of them, too.
        "rl": {"questions": 32, "replies": 8, "updates": 4, "even_updates": False, "attempts": 3},
    },
    "gpu": {
        "dtype": "float32",
        "rows": 64,
        "steps": {"recall": 300, "pretrain": 400, "sft": 3000, "longer": 50, "surer": 50},
        "rate": {"recall": 1e-3, "pretrain": 2e-3, "sft": 2e-3, "longer": 5e-5, "surer": 5e-5},
        "passes": 2,
        "rl": {"questions": 256, "replies": 16, "updates": 16},
    },
}


def scaled(plan: dict[str, Any], scale: float) -> dict[str, Any]:
    """The plan with every stage's steps multiplied."""
    return plan | {"steps": {name: max(4, round(count * scale)) for name, count in plan["steps"].items()}}


def claim(out: Path, made_by: dict[str, Any]) -> None:
    """Notes in `out` what its runs are made by. Raises `UserError` if those there were made by something else."""
    file = out / "made_by.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made_by) + "\n", encoding="utf-8")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in made_by.items() if found.get(name) != value]
    if other:
        name = other[0]
        raise UserError(f"{out} was made with {name} {found.get(name)}, not {made_by[name]}: choose another --out")


def fingerprint(plan: dict[str, Any]) -> str:
    """Digest of what the stages up to the last are made by, beside the tasks: data and models of another are kept."""
    parts = (plan, LENGTH, RECALL, FOUND, WINDOWS, SHARPER, BALANCE, OFTEN, REINFORCED, recipe.TAUGHT, recipe.LONGEST)
    return digest(parts)


def prepare(out: Path, plan: dict[str, Any], tasks: Sequence[str]) -> None:
    """Tokenizer, first weights and data in `out`; a file that is there already is kept. Raises `UserError`."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "start").exists():
        recipe.train_tokenizer(out / "tokenizer")
        save(recipe.first_weights(recipe.config()), out / "start", "float32", out / "tokenizer", overwrite=True)
    tokenizer, chosen = Tokenizer.load(out / "tokenizer"), find(tasks)
    # At least 40 tokens a list or document, 100 a conversation with its part of the lists.
    count = {name: steps * plan["rows"] * LENGTH // plan["passes"] for name, steps in plan["steps"].items()}
    short = reminders(0, tokenizer, lambda rng: recipe.evenly(rng, recipe.SHORT))
    _write(out / "recall.jsonl", itertools.islice(short, max(1000, count["recall"] // 40)))
    texts = itertools.islice(recipe.documents(1, chosen), max(1000, count["pretrain"] // 40))
    alone = ({"text": text} for text in texts)
    _write(out / "pretrain.jsonl", _among(alone, reminders(1, tokenizer, recipe.evenly), RECALL))
    often = [task for task in recipe.taught(chosen) for _ in range(OFTEN.get(task.name, 1))]
    problems = itertools.islice(mixture(often, seed=2), max(1000, count["sft"] // 100))
    rng = random.Random("far")
    asked = conversations((recipe.far(rng) for _ in itertools.count()), tokenizer)
    lists = (row for pair in zip(reminders(2, tokenizer, recipe.long), asked, strict=False) for row in pair)
    _write(out / "sft.jsonl", _among(conversations(problems, tokenizer), lists, RECALL))


def conversations(problems: Iterable[Problem], tokenizer: Tokenizer) -> Iterator[dict[str, list[int]]]:
    """Conversations as tokens and weights: encoded once, the loader has little left to do."""
    chat = recipe.Chat.load()
    before, after = chat.prompt("\N{SYMBOL FOR ENQUIRY}").split("\N{SYMBOL FOR ENQUIRY}")
    for problem in problems:
        prompt = tokenizer.encode(before + problem.question + after)
        reply = tokenizer.encode(problem.reply + recipe.END)
        yield {"tokens": prompt + reply, "weights": [0] * len(prompt) + [1] * len(reply)}


def reminders(seed: int, tokenizer: Tokenizer, items: Callable[[random.Random], int]) -> Iterator[dict[str, list[int]]]:
    """Lists of so many items to recall, without end, as tokens and weights: of use are the numbers found again."""
    rng = random.Random(f"reminders {seed}")
    while True:
        parts = [tokenizer.encode(part) for part in recipe.recall(rng, items(rng))]
        found = [len(part) * [FOUND * (n > 0 and n % 2 == 0)] for n, part in enumerate(parts)]
        yield {"tokens": [t for part in parts for t in part], "weights": [w for part in found for w in part]}


def _among(rows: Iterable[Any], others: Iterator[Any], count: int) -> Iterator[Any]:
    """So many of the rows, then one of the others."""
    for n, row in enumerate(rows, 1):
        yield row
        if n % count == 0:
            yield next(others)


def _write(file: Path, values: Iterable[Any]) -> None:
    if not file.exists():
        part = file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(value) + "\n" for value in values)
        part.replace(file)


def model_of(step: Step, out: Path) -> Path:
    """Where the model is that a step makes."""
    return out / step if step in CHANGES else out / step / "model"


def settings(stage: Step, out: Path, plan: dict[str, Any], tasks: Sequence[str]) -> Settings:
    """The settings of a stage, as a TOML file would give them. Raises `UserError`."""
    steps = plan["steps"][stage]
    reinforced = REINFORCED.get(stage)
    at = STEPS.index(stage)
    common: dict[str, Any] = {
        "stage": "rl" if reinforced else "sft" if stage == "recall" else stage,
        "out": str(out / stage),
        "steps": steps,
        "model": {
            "dtype": plan["dtype"],
            "remat": "none",
            "tokenizer": str(out / "tokenizer"),
            "path": str(model_of(STEPS[at - 1], out) if at else out / "start"),
        },
        "guard": {"action": "skip"},
        "log": {"tensorboard": False},
    }
    rate = {"learning_rate": plan["rate"][stage], **BALANCE}
    if reinforced:
        # Of what is solved hardly a group of replies is mixed, and groups that are not teach nothing.
        chosen = [task.name for task in find(tasks) if task.name in reinforced["tasks"]] or list(tasks)
        own = {"tasks": chosen, "hardest_share": 0.9, "windows": list(WINDOWS), "row_tokens": LENGTH}
        decay = steps * plan["rl"]["updates"] if stage == STAGES[-1] else 0
        optimizer = rate | {"warmup": 0, "decay": decay, "final": 0.0, "eps": 1e-15, "weight_decay": 0.0}
        rl = plan["rl"] | reinforced | own
        return parse(Settings, common | {"optimizer": optimizer, "checkpoint": {"every": 10}, "rl": rl})
    optimizer = rate | {"warmup": min(50, steps // 10), "decay": steps // 3, "final": 0.02, "weight_decay": 0.01}
    data = {"length": LENGTH, "rows": plan["rows"], "files": [str(out / f"{stage}.jsonl")]}
    every = {"every": max(1, min(250, steps // 4))}
    return parse(Settings, common | {"optimizer": optimizer, "checkpoint": every, "data": data})


def change(step: Step, out: Path) -> None:
    """Writes the model of a step that does not train.

    "sharpened" is what RL begins with: SFT's model with softmax attention's queries times `SHARPER`. "settled" is what
    ships: a model between those after RL's stages (arXiv 2109.01903), its queries times `SHARPER_AGAIN`.
    """
    if step == "sharpened":
        model = _sharper(load(model_of("sft", out)), SHARPER)
    else:
        before, after = (load(model_of(stage, out)) for stage in ("longer", "surer"))
        between = jax.tree.map(lambda a, b: a * (1 - KEPT) + b * KEPT, before, after)
        model = _sharper(between, SHARPER_AGAIN)
    save(model, model_of(step, out), "float32", out / "tokenizer")


def _sharper(model: M1, factor: float) -> M1:
    weights = flatten(model)
    weights["softmax.q_proj"] *= factor
    return build(model.config, lambda path, _: weights[path])


def install(model: Path, tokenizer: Path, folder: Path = FOLDER) -> None:
    """Writes a trained model as it ships: bfloat16, one file in the official layout, the router float32."""
    trained = load(model)
    specs = param_table(trained.config)
    arrays = {p: np.asarray(x.astype(specs[p].dtype or jnp.bfloat16)) for p, x in flatten(trained).items()}
    tensors = {n: arrays[s.target][s.index].reshape(s.shape) for n, s in expected(trained.config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is made for its owner's eyes only
    (folder / "config.json").write_text(json.dumps(trained.config.to_official(), indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
