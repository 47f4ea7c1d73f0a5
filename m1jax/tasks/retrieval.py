"""Retrieval of a needle: the one letter in a long list that occurs once, and the number before it.

The number is before its letter so that a causal model knows it where it sees the letter that is looked for.
"""

import random
import string

from m1jax.tasks.task import Instance, Solution, Task


def _draw(rng: random.Random, difficulty: int) -> Instance:
    needle, *others = rng.sample(string.ascii_lowercase, 26)
    letters = [needle, *(rng.choice(others) for _ in range(difficulty))]
    rng.shuffle(letters)
    return {"items": ",".join(f"{rng.randrange(10)}{letter}" for letter in letters), "letter": needle}


def _solve(instance: Instance) -> Solution:
    found = next(item for item in instance["items"].split(",") if item[1] == instance["letter"])
    return Solution(found[::-1], found[0])


RETRIEVAL = Task(
    name="retrieval",
    difficulty=15,  # one less than the items of the list
    draw=_draw,
    phrasings=(
        'Given "{items}", which number has "{letter}"?',
        'Remember "{items}". Find "{letter}".',
        'Here is a list: "{items}". What is the number of "{letter}"?',
    ),
    solve=_solve,
)
