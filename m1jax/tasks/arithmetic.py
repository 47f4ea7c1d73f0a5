"""Addition, subtraction and multiplication as on paper: column by column from the right, with carry or borrow."""

import random
from itertools import zip_longest

from m1jax.tasks.task import Instance, Solution, Task


def number(rng: random.Random, digits: int) -> int:
    """A number of exactly so many digits; 0 counts as one digit."""
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of both numbers from the right, the shorter one continued with zeros."""
    return [(int(x), int(y)) for x, y in zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0")]


def add(a: int, b: int) -> str:
    """Each line: two digits + carry = carry and digit."""
    lines, carry = [], 0
    for x, y in columns(a, b):
        total = x + y + carry
        lines.append(f"{x}+{y}+{carry}={total:02}")
        carry = total // 10
    return "\n".join(lines)


def subtract(a: int, b: int) -> str:
    """Each line: digit - digit - borrow = what the next column lends, 0 or 1, and the digit."""
    lines, borrow = [], 0
    for x, y in columns(a, b):
        left = x - y - borrow
        lines.append(f"{x}-{y}-{borrow}={int(left < 0)}{left % 10}")
        borrow = int(left < 0)
    return "\n".join(lines)


def times_digit(a: int, digit: int) -> str:
    """Each line: digit * digit + carry = carry and digit."""
    lines, carry = [], 0
    for x in map(int, reversed(str(a))):
        total = x * digit + carry
        lines.append(f"{x}*{digit}+{carry}={total:02}")
        carry = total // 10
    return "\n".join(lines)


def multiply(a: int, b: int) -> str:
    """Times each digit of b; the rows are added up one by one."""
    lines, total = [], 0
    for place, digit in enumerate(map(int, reversed(str(b)))):
        row = a * digit * 10**place
        lines += [times_digit(a, digit), str(row)]
        if place:
            lines += [add(total, row), str(total + row)]
        total += row
    return "\n".join(lines)


def _operands(rng: random.Random, difficulty: int) -> tuple[int, int]:
    """One of `difficulty` digits, the other of as many or fewer, in any order."""
    pair = [number(rng, difficulty), number(rng, rng.randint(max(1, difficulty - 1), difficulty))]
    rng.shuffle(pair)
    return pair[0], pair[1]


def _unordered(instance: Instance) -> list[int]:
    return sorted((instance["a"], instance["b"]))


def _draw(rng: random.Random, difficulty: int) -> Instance:
    a, b = _operands(rng, difficulty)
    return {"a": a, "b": b}


def _draw_difference(rng: random.Random, difficulty: int) -> Instance:
    a, b = sorted(_operands(rng, difficulty), reverse=True)
    return {"a": a, "b": b}


# Digits of the two factors at each difficulty.
_FACTORS = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3))


def _draw_factors(rng: random.Random, difficulty: int) -> Instance:
    first, second = _FACTORS[difficulty - 1]
    return {"a": number(rng, first), "b": number(rng, second)}


ADDITION = Task(
    name="addition",
    difficulty=4,  # digits
    draw=_draw,
    phrasings=(
        "What is {a} + {b}?",
        "{a} + {b} =",
        "Add {a} and {b}.",
        "Compute {a} + {b}.",
        "How much is {a} plus {b}?",
    ),
    solve=lambda i: Solution(add(i["a"], i["b"]), str(i["a"] + i["b"])),
    identity=_unordered,
)
SUBTRACTION = Task(
    name="subtraction",
    difficulty=4,  # digits; the result is never negative
    draw=_draw_difference,
    phrasings=(
        "What is {a} - {b}?",
        "{a} - {b} =",
        "Subtract {b} from {a}.",
        "Compute {a} - {b}.",
        "How much is {a} minus {b}?",
    ),
    solve=lambda i: Solution(subtract(i["a"], i["b"]), str(i["a"] - i["b"])),
)
MULTIPLICATION = Task(
    name="multiplication",
    difficulty=3,  # as in _FACTORS
    hardest=len(_FACTORS),
    draw=_draw_factors,
    phrasings=(
        "What is {a} * {b}?",
        "{a} * {b} =",
        "Multiply {a} by {b}.",
        "Compute {a} * {b}.",
        "How much is {a} times {b}?",
    ),
    solve=lambda i: Solution(multiply(i["a"], i["b"]), str(i["a"] * i["b"])),
    identity=_unordered,
)
