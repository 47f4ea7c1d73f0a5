"""Retrieval of a needle: one value out of a long list of names and values."""

import random
import string

from m1jax.tasks.task import Instance, Solution, Task


def _draw(rng: random.Random, difficulty: int) -> Instance:
    names: dict[str, int] = {}
    while len(names) < difficulty + 1:
        names[f"{rng.choice(string.ascii_lowercase)}{rng.randrange(10, 100)}"] = rng.randrange(100, 1000)
    return {"items": tuple(f"{name}={value}" for name, value in names.items()), "name": rng.choice(list(names))}


def _solve(instance: Instance) -> Solution:
    found = next(item for item in instance["items"] if item.startswith(f"{instance['name']}="))
    return Solution(found, found.partition("=")[2])


RETRIEVAL = Task(
    name="retrieval",
    difficulty=15,  # one less than the items of the list
    draw=_draw,
    phrasings=(
        "{items}. What is {name}?",
        "Remember {items}. What is the value of {name}?",
        "Here is a list: {items}. Find {name}.",
    ),
    solve=_solve,
)
