"""Comparison, sorting and the next number in a sequence."""

import itertools
import random
from typing import Any

from m1jax.tasks.arithmetic import number, subtract
from m1jax.tasks.task import Instance, Solution, Task


def _draw_two(rng: random.Random, difficulty: int) -> Instance:
    a = number(rng, difficulty)
    digits = str(a)
    b = a
    while b == a:
        if rng.random() < 0.5:  # numbers that begin alike: chance rarely makes them
            keep = rng.randrange(len(digits))
            b = int(digits[:keep] + "".join(rng.choice("0123456789") for _ in digits[keep:]))
        else:
            b = number(rng, rng.randint(max(1, difficulty - 1), difficulty))
    pair = [a, b]
    rng.shuffle(pair)
    return {"a": pair[0], "b": pair[1], "wanted": rng.choice(("larger", "smaller"))}


def compare(a: int, b: int, answer: int) -> str:
    """How long both are; then column by column from the left both digits, the order so far, the answer's digit."""
    length = max(len(str(a)), len(str(b)))
    lines, order = [f"{len(str(a))}{_order(len(str(a)), len(str(b)))}{len(str(b))}"], "="
    for x, y, digit in zip(*(str(n).zfill(length) for n in (a, b, answer)), strict=True):
        order = _order(x, y) if order == "=" else order
        lines.append(f"{x}{y}{order}{digit}")
    return "\n".join(lines)


def _order(x: Any, y: Any) -> str:
    return "=" if x == y else "<" if x < y else ">"


def _solve_comparison(instance: Instance) -> Solution:
    a, b = instance["a"], instance["b"]
    answer = max(a, b) if instance["wanted"] == "larger" else min(a, b)
    return Solution(compare(a, b, answer), str(answer))


COMPARISON = Task(
    name="comparison",
    difficulty=5,  # digits
    draw=_draw_two,
    phrasings=(
        "Which is {wanted}, {a} or {b}?",
        "Which number is {wanted}: {a} or {b}?",
        "Compare {a} and {b}. Which one is {wanted}?",
        "Of {a} and {b}, which is the {wanted} one?",
    ),
    solve=_solve_comparison,
    identity=lambda i: sorted((i["a"], i["b"])),
)


def _draw_list(rng: random.Random, difficulty: int) -> Instance:
    return {
        "numbers": tuple(rng.sample(range(100), difficulty + 1)),
        "order": rng.choice(("ascending", "descending")),
    }


def _solve_sorting(instance: Instance) -> Solution:
    """Puts one number after the other where it belongs among those before."""
    done: list[int] = []
    lines = []
    for new in instance["numbers"]:
        done = sorted([*done, new], reverse=instance["order"] == "descending")
        lines.append(f"{new}:{','.join(map(str, done))}")
    return Solution("\n".join(lines), ", ".join(map(str, done)))


SORTING = Task(
    name="sorting",
    difficulty=5,  # one less than the numbers to sort
    hardest=99,
    draw=_draw_list,
    phrasings=(
        "Sort {numbers} in {order} order.",
        "Sort these numbers in {order} order: {numbers}.",
        "Put {numbers} in {order} order.",
        "What is {numbers} in {order} order?",
    ),
    solve=_solve_sorting,
)


def _draw_sequence(rng: random.Random, difficulty: int) -> Instance:
    """1: a constant is added; 2: or subtracted; 3: or two constants take turns; 4: or what is added grows by one."""
    kind = rng.randint(1, difficulty)
    step, other = rng.sample(range(1, 10), 2)
    steps = {1: (step,) * 4, 2: (-step,) * 4, 3: (step, other) * 2 + (step,), 4: tuple(range(step, step + 4))}[kind]
    start = rng.randint(0, 50) + (40 if kind == 2 else 0)
    return {"terms": tuple(itertools.accumulate(steps[:-1], initial=start)), "steps": steps}


def _solve_sequence(instance: Instance) -> Solution:
    """How far it is from term to term: their last digits as in subtraction, which tells; then one more step."""
    terms, last = instance["terms"], instance["steps"][-1]
    lines = [subtract(max(a, b) % 10, min(a, b) % 10) for a, b in itertools.pairwise(terms)]
    answer = terms[-1] + last
    return Solution("\n".join([*lines, f"{terms[-1]}{last:+}={answer}"]), str(answer))


SEQUENCE = Task(
    name="sequence",
    difficulty=4,
    hardest=4,
    draw=_draw_sequence,
    phrasings=(
        "What comes next: {terms}?",
        "What is the next number in {terms}?",
        "Continue the sequence {terms}.",
        "Find the next number: {terms}.",
    ),
    solve=_solve_sequence,
)
