"""What a task is: problems drawn from a seed, solved step by step, split by a hash of themselves, and verified.

A problem is an instance (the numbers or words it is about) in one of several phrasings. Which split it belongs to
depends on the instance alone, so that no phrasing of a held-out problem is ever trained on.
"""

import ast
import contextlib
import dataclasses
import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from m1jax.errors import UserError

Split = Literal["train", "held-out"]
Instance = Mapping[str, Any]

HELD_OUT = 8  # one instance in so many is held out
_TRIES = 10_000  # draws before a split counts as empty


class Solution(NamedTuple):
    """A chain of thought that computes the answer, and the answer."""

    thought: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its solution; `identity` is the same for all phrasings of one instance."""

    task: str
    question: str
    thought: str
    answer: str
    identity: str

    @property
    def reply(self) -> str:
        """The reply that is to be learnt, in M1's format."""
        return f"<think>\n{self.thought}\n</think>\n{self.answer}"


class Verdict(NamedTuple):
    """What the rules say of a reply."""

    well_formed: bool  # <think>…</think> and then an answer, once each
    correct: bool  # the answer is the right one


@dataclasses.dataclass(frozen=True)
class Task:
    """A family of problems.

    Attributes:
      name: by which it is chosen.
      difficulty: the shipped one, at which the task is trained and evaluated unless said otherwise; the easiest is 1.
      draw: (random, difficulty) to an instance: what the phrasings name, by name.
      phrasings: format strings over the instance; lists are shown with commas.
      solve: from an instance to thought and answer.
      hardest: the highest difficulty that there is.
      identity: what tells instances apart; questions that are the same but for order should give the same value.
      file: where it was read from, for messages.
    """

    name: str
    difficulty: int
    draw: Callable[[random.Random, int], Instance]
    phrasings: tuple[str, ...]
    solve: Callable[[Instance], Solution]
    hardest: int | None = None
    identity: Callable[[Instance], Any] = lambda instance: sorted(instance.items())
    file: str = ""

    def __post_init__(self) -> None:
        good = not isinstance(self.phrasings, str) and all(isinstance(phrasing, str) for phrasing in self.phrasings)
        if not good or not self.phrasings:
            raise UserError(f'task {self.name}: phrasings must be one or more strings, such as ("What is {{n}}?",)')

    def level(self, fraction: float) -> int:
        """The difficulty that is this fraction of the shipped one, from the easiest to the hardest there is."""
        level = max(1, round(self.difficulty * fraction))
        return level if self.hardest is None else min(level, self.hardest)

    def problem(self, rng: random.Random, difficulty: int | None = None, split: Split = "train") -> Problem:
        """A problem of the split, drawn anew until it belongs there.

        Raises:
          UserError: there is no such difficulty, it has no problem of this split, or one of the task's functions or
            phrasings fails.
        """
        difficulty = self.difficulty if difficulty is None else difficulty
        if difficulty < 1:
            raise UserError(f"task {self.name}: difficulty must be 1 or more, not {difficulty}")
        if self.hardest is not None and difficulty > self.hardest:
            raise UserError(f"task {self.name}: difficulty must be {self.hardest} at most, not {difficulty}")
        for _ in range(_TRIES):
            with self._blamed(f"draw of difficulty {difficulty}"):
                instance = self.draw(rng, difficulty)
                identity = f"{self.name} {self.identity(instance)}"
            if split_of(identity) == split:
                phrasing = rng.choice(self.phrasings)
                with self._blamed(f"phrasing {phrasing!r}"):
                    question = phrasing.format_map({name: _shown(value) for name, value in instance.items()})
                with self._blamed(f"solve of {question[:60]!r}"):
                    thought, answer = self.solve(instance)
                    if not (isinstance(thought, str) and isinstance(answer, str)):
                        raise TypeError("thought and answer must be strings")
                return Problem(self.name, question, thought, answer, identity)
        raise UserError(f"task {self.name} has no {split} problem of difficulty {difficulty}: choose a higher one")

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        """Turns whatever a part of the task raises into one line that names it."""
        try:
            yield
        except Exception as error:
            where = f" ({self.file})" if self.file else ""
            raise UserError(f"task {self.name}{where}: {what} fails: {type(error).__name__}: {error}") from error

    def problems(
        self, count: int, seed: int, difficulty: int | None = None, split: Split = "held-out"
    ) -> list[Problem]:
        """At most `count` different problems; fewer if chance finds no more in 20 times as many draws."""
        rng = random.Random(f"{self.name} {seed}")
        found: dict[str, Problem] = {}
        for _ in range(20 * count):
            if len(found) == count:
                break
            problem = self.problem(rng, difficulty, split)
            found.setdefault(problem.identity, problem)
        return list(found.values())


def mixture(tasks: Sequence[Task], seed: int, difficulty: float = 1.0, hardest_share: float = 0.5) -> Iterator[Problem]:
    """Training problems without end, all tasks alike, at random difficulties from 1 to the shipped one.

    `difficulty` scales the upper end: 0.5 is half of each task's shipped difficulty, for a curriculum; above 1 it is
    harder than that, as far as a task has harder problems. Of the upper end are `hardest_share` of the problems: there
    are the most instances of it, and in reinforcement learning the most to gain.
    """
    rng = random.Random(seed)
    while True:
        task = rng.choice(tasks)
        highest = task.level(difficulty)
        level = highest if rng.random() < hardest_share else rng.randint(1, highest)
        yield task.problem(rng, level)


def split_of(identity: str) -> Split:
    """Where the problem of this identity belongs."""
    return "held-out" if hashlib.sha256(identity.encode()).digest()[0] < 256 // HELD_OUT else "train"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# --- verification --------------------------------------------------------------------------------------------------

_FORMAT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
# What may stand around a whole answer, one thing inside the other.
_DECORATION = re.compile(
    r"""\*\*([^*]*)\*\*|`([^`]*)`|"([^"]*)"|'([^']*)'|“([^“”]*)”|‘([^‘’]*)’|\[([^][]*)\]|\(([^()]*)\)"""
    r"""|\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^\\]*|\\[a-z]+\{.*\})\\\)|\\\[([^\\]*|\\[a-z]+\{.*\})\\\]|\\(?:boxed|text)\{((?:[^{}]|\{[^{}]*\})*)\}"""
)
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is:?|:) |\*\*(?:final )?answer(?:\*\*:|:\*\*) ?", re.IGNORECASE)
_INTEGER = re.compile(r"-?\d+")
_INTEGERS = re.compile(r"-?\d+(, -?\d+)+")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+")
_THOUSANDS_INSIDE = re.compile(r"(?<![\d,])\d{1,3}(,\d{3})+(?![\d,])")
_COMPUTABLE = re.compile(r"([-+*() \d]|\b(True|False|and|or|not)\b)+")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_SIGNS = {"\N{MINUS SIGN}": "-", "×": "*", "·": "*", r"\times": "*", r"\cdot": "*"}
_WORKED_OUT = 200  # characters of what an answer was worked out from


def verify(problem: Problem, reply: str) -> Verdict:
    """Judges a reply: its format, and the answer after `</think>` (the whole reply if there is no such tag)."""
    match = _FORMAT.fullmatch(reply)
    answer = reply.rpartition("</think>")[2]
    well_formed = match is not None and match["thought"].strip() != "" and answer.strip() != ""
    well_formed = well_formed and reply.count("<think>") == 1 and reply.count("</think>") == 1
    return Verdict(well_formed, _says(_result(bare(answer)), bare(problem.answer)))


def bare(answer: str) -> str:
    """The answer without what stands around the whole of it, and with single spaces.

    That is a lead such as "The answer is", quotes, brackets, bold, code, mathematics, `\\boxed{}`, a final full stop.
    """
    plain = " ".join(answer.split())
    while True:
        plain = plain.strip().removesuffix(".").rstrip()
        if found := _LEAD.match(plain):
            plain = plain[found.end() :]
        elif found := _DECORATION.fullmatch(plain):
            plain = found[found.lastindex or 0]
        else:
            return plain


def _result(answer: str) -> str:
    """Of a bare "27 + 58 = 85" what stands at the end, if all that it is worked out from comes to the same."""
    *sides, last = answer.split("=")
    last = bare(last)
    value = _value(last)
    return last if sides and value is not None and all(_value(bare(side)) == value for side in sides) else answer


def _value(text: str) -> int | None:
    """What sums, products and truth values come to; None if the text is anything else."""
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text = _THOUSANDS_INSIDE.sub(lambda found: found[0].replace(",", ""), text).strip()
    if len(text) > _WORKED_OUT or not _COMPUTABLE.fullmatch(text):
        return None
    try:
        return _computed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _computed(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_computed(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _computed(operand)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)([_computed(value) for value in values])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_computed(left), _computed(right))
    raise ValueError("neither a sum, a product nor a truth value")


def _says(answer: str, wanted: str) -> bool:
    """Whether two bare answers are the same; numbers may be written as people write them, else letters decide."""
    if wanted in ("True", "False"):
        return answer.capitalize() == wanted
    if _INTEGER.fullmatch(wanted):
        answer = answer.replace("\N{MINUS SIGN}", "-")
        return (answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer) == wanted
    answer, wanted = (re.sub(r" ?, ?", ", ", text) for text in (answer, wanted))
    if _INTEGERS.fullmatch(wanted):
        answer = answer.replace("\N{MINUS SIGN}", "-").replace(", ", " ").replace(" ", ", ")
    return answer == wanted
