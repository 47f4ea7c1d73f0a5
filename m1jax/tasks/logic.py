"""Boolean logic: an expression of `and`, `or`, `not` in brackets, worked out from the inside."""

import random
import re

from m1jax.tasks.task import Instance, Solution, Task

_INNERMOST = re.compile(r"\(not (True|False)\)|\((True|False) (and|or) (True|False)\)")


def _expression(rng: random.Random, operators: int) -> str:
    if operators == 0:
        return rng.choice(("True", "False"))
    if rng.random() < 0.3:
        return f"(not {_expression(rng, operators - 1)})"
    left = rng.randrange(operators)
    return f"({_expression(rng, left)} {rng.choice(('and', 'or'))} {_expression(rng, operators - 1 - left)})"


def _reduce(match: re.Match[str]) -> str:
    if match[1]:
        return str(match[1] == "False")
    values = match[2] == "True", match[4] == "True"
    return str(all(values) if match[3] == "and" else any(values))


def _solve(instance: Instance) -> Solution:
    """The first bracket without brackets inside is replaced by its value, until nothing is left to replace."""
    expression, lines = f"({instance['expression']})", []
    while match := _INNERMOST.search(expression):
        value = _reduce(match)
        lines.append(f"{match[0]}={value}")
        expression = expression[: match.start()] + value + expression[match.end() :]
        lines.append(expression)
    return Solution("\n".join(lines[:-1]), expression)


LOGIC = Task(
    name="logic",
    difficulty=4,  # operators
    draw=lambda rng, difficulty: {"expression": _expression(rng, difficulty)[1:-1]},
    phrasings=(
        "What is {expression}?",
        "Evaluate {expression}.",
        "Is {expression} True or False?",
        "Compute {expression}.",
    ),
    solve=_solve,
)
