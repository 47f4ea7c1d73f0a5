"""Retrieval of a needle: one value out of a long list of names and values."""

import itertools
import random
from collections.abc import Sequence

from m1jax.tasks.task import Instance, Solution, Task

KINDS = (
    "red", "blue", "green", "white", "black", "pink", "old", "new", "big", "small", "long", "short",
    "hot", "cold", "dry", "wet", "soft", "hard", "light", "dark", "fast", "slow", "thin", "round",
)  # fmt: skip
THINGS = (
    "key", "cup", "hat", "box", "bag", "pen", "map", "lamp", "ring", "coin", "fork", "boat",
    "bell", "ball", "fig", "pear", "book", "shoe", "coat", "door", "drum", "kite", "leaf", "rope",
)  # fmt: skip
NAMES = tuple(map(" ".join, itertools.product(KINDS, THINGS)))


def named_numbers(rng: random.Random, count: int, names: Sequence[str] = NAMES) -> dict[str, int]:
    """So many different names, each with a number of two digits."""
    return {name: rng.randrange(10, 100) for name in rng.sample(names, count)}


def _draw(rng: random.Random, difficulty: int) -> Instance:
    numbers = named_numbers(rng, difficulty + 1)
    return {"items": tuple(f"{name}={value}" for name, value in numbers.items()), "name": rng.choice(list(numbers))}


def _solve(instance: Instance) -> Solution:
    found = next(item for item in instance["items"] if item.startswith(f"{instance['name']}="))
    return Solution(found, found.partition("=")[2])


RETRIEVAL = Task(
    name="retrieval",
    difficulty=15,  # one less than the items of the list
    hardest=len(NAMES) - 1,
    draw=_draw,
    phrasings=(
        "{items}. What is {name}?",
        "Remember {items}. What is the value of {name}?",
        "Here is a list: {items}. Find {name}.",
    ),
    solve=_solve,
)
