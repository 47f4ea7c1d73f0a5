"""Letter counting, reversal and Caesar cipher on words of random letters; words stand in quotes."""

import random
import string

from m1jax.tasks.task import Instance, Solution, Task


def word(rng: random.Random, difficulty: int) -> str:
    """Letters at random, of the whole alphabet or of a few, so that letters repeat."""
    letters = rng.sample(string.ascii_lowercase, 3) if rng.random() < 0.5 else string.ascii_lowercase
    return "".join(rng.choices(letters, k=rng.randint(max(1, difficulty - 1), difficulty)))


def _draw_counting(rng: random.Random, difficulty: int) -> Instance:
    text = word(rng, difficulty)
    letter = rng.choice(text) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
    return {"word": text, "letter": letter}


def _solve_counting(instance: Instance) -> Solution:
    """Each letter followed by the count so far."""
    count, steps = 0, []
    for letter in instance["word"]:
        count += letter == instance["letter"]
        steps.append(f"{letter}{count}")
    return Solution("".join(steps), str(count))


COUNTING = Task(
    name="counting",
    difficulty=9,  # letters
    draw=_draw_counting,
    phrasings=(
        'How many "{letter}" are in "{word}"?',
        'How often is "{letter}" in "{word}"?',
        'Count the letter "{letter}" in "{word}".',
        'How many times does "{letter}" occur in "{word}"?',
    ),
    solve=_solve_counting,
)


def _solve_reversal(instance: Instance) -> Solution:
    """The letters numbered, then from the last number down."""
    numbered = [f"{n}{letter}" for n, letter in enumerate(instance["word"], 1)]
    thought = f"{''.join(numbered)}\n{''.join(reversed(numbered))}"
    return Solution(thought, f'"{instance["word"][::-1]}"')


REVERSAL = Task(
    name="reversal",
    difficulty=8,  # letters
    draw=lambda rng, difficulty: {"word": word(rng, difficulty)},
    phrasings=(
        'Reverse "{word}".',
        'Reverse the word "{word}".',
        'Write "{word}" backwards.',
        'What is "{word}" spelled backwards?',
    ),
    solve=_solve_reversal,
)


def _draw_cipher(rng: random.Random, difficulty: int) -> Instance:
    way = rng.choice(("forward", "back"))
    return {"word": word(rng, difficulty), "shift": rng.randint(1, 9), "way": way}


def _solve_cipher(instance: Instance) -> Solution:
    """Letter by letter: its number, the sum, the same within 1 to 26 if it is not, and that letter."""
    shift = instance["shift"] if instance["way"] == "forward" else -instance["shift"]
    lines = []
    for letter in instance["word"]:
        place = string.ascii_lowercase.index(letter) + 1
        within = (place + shift - 1) % 26 + 1
        wrapped = "" if place + shift == within else f",{within:02}"
        lines.append(f"{letter}{place:02}{shift:+}={place + shift:02}{wrapped}{string.ascii_lowercase[within - 1]}")
    return Solution("\n".join(lines), f'"{"".join(line[-1] for line in lines)}"')


CIPHER = Task(
    name="cipher",
    difficulty=7,  # letters
    draw=_draw_cipher,
    phrasings=(
        'Shift each letter of "{word}" {way} by {shift}.',
        'Caesar cipher: move "{word}" {way} by {shift}.',
        'Apply a Caesar shift of {shift} {way} to "{word}".',
    ),
    solve=_solve_cipher,
)
