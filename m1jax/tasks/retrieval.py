"""Retrieval of a needle: the one name in a long list that occurs once, and its number."""

import random

from m1jax.tasks.task import Instance, Solution, Task

THINGS = (
    "key", "cup", "hat", "box", "bag", "pen", "map", "lamp", "ring", "coin", "fork", "boat",
    "bell", "ball", "fig", "pear", "book", "shoe", "coat", "door", "drum", "kite", "leaf", "rope",
)  # fmt: skip


def _draw(rng: random.Random, difficulty: int) -> Instance:
    needle, *others = rng.sample(THINGS, len(THINGS))
    names = [needle, *(rng.choice(others) for _ in range(difficulty))]
    rng.shuffle(names)
    return {"items": tuple(f"{name}{rng.randrange(10)}" for name in names), "name": needle}


def _solve(instance: Instance) -> Solution:
    found = next(item for item in instance["items"] if item[:-1] == instance["name"])
    return Solution(f"Found: {found}", found[-1])


RETRIEVAL = Task(
    name="retrieval",
    difficulty=15,  # one less than the items of the list
    draw=_draw,
    phrasings=(
        "Given {items}. Which number has {name}?",
        "Remember {items}. Find {name}.",
        "Here is a list: {items}. What is the number of {name}?",
    ),
    solve=_solve,
)
