"""Tasks: every chain of thought computes, splits never mix, verification is by rule."""

import itertools
import random
import re
from pathlib import Path

import pytest

from m1jax import tasks
from m1jax.errors import UserError
from m1jax.tasks import TASKS, Problem, Task, mixture, split_of, verify

# A task as a user would write it.
OWN_TASK = '''"""Digit sums, as an example of a task of one's own."""

from m1jax.tasks import Instance, Solution, Task


def draw(rng, difficulty):
    """A number of so many digits."""
    return {"n": rng.randrange(10 ** (difficulty - 1), 10**difficulty)}


def solve(instance: Instance) -> Solution:
    """Adds digit by digit."""
    total, lines = 0, []
    for digit in map(int, str(instance["n"])):
        lines.append(f"{total}+{digit}={total + digit}")
        total += digit
    return Solution("\\n".join(lines), str(total))


TASK = Task(
    name="digit-sum",
    difficulty=3,
    draw=draw,
    phrasings=("What is the digit sum of {n}?", "Add the digits of {n}."),
    solve=solve,
)
'''


def sample(task: Task, count: int = 60) -> list[Problem]:
    rng = random.Random(5)
    return [task.problem(rng, level) for level in range(1, task.difficulty + 1) for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def word_of(problem: Problem) -> str:
    return max(re.findall(r'"([a-z]+)"', problem.question), key=len)


def expected(problem: Problem) -> str:
    """The answer, computed from the question in another way."""
    question, values = problem.question, numbers(problem.question)
    match problem.task:
        case "addition":
            return str(sum(values))
        case "subtraction":
            return str(max(values) - min(values))
        case "multiplication":
            return str(values[0] * values[1])
        case "comparison":
            return str(max(values) if "larger" in question else min(values))
        case "sorting":
            return ", ".join(map(str, sorted(values, reverse="descending" in question)))
        case "counting":
            letter = re.findall(r'"([a-z])"', question)[0]
            word = re.findall(r'"([a-z]+)"', question)[-1]
            return str(word.count(letter))
        case "reversal":
            return f'"{word_of(problem)[::-1]}"'
        case "cipher":
            shift = numbers(question)[0] * (-1 if "back" in question else 1)
            return '"' + "".join(chr((ord(c) - 97 + shift) % 26 + 97) for c in word_of(problem)) + '"'
        case "logic":
            asked = question.removesuffix(" True or False?") if question.startswith("Is ") else question
            found = re.fullmatch(r"(?:What is|Is|Evaluate|Compute) (.*?)[.?]?", asked)
            assert found
            return str(eval(found[1]))
        case "retrieval":
            letter = re.findall(r'"([a-z])"[?.]$', question)[0]
            (number,) = re.findall(rf"(\d){letter}\b", question)
            return number
    raise AssertionError(problem.task)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "sequence"])
def test_answers_are_right(name: str) -> None:
    for problem in sample(TASKS[name]):
        assert problem.answer == expected(problem), problem


def test_ciphers_are_worked_out_by_the_letters_numbers() -> None:
    for problem in sample(TASKS["cipher"]):
        lines = [re.fullmatch(r"([a-z])(\d\d)([+-]\d)=(-?\d+)(,\d\d)?([a-z])", x) for x in problem.thought.splitlines()]
        for old, place, shift, total, within, new in (found.groups() for found in lines if found):
            assert int(place) == ord(old) - 96 and int(total) == int(place) + int(shift)
            last = int((within or f",{total}")[1:])
            assert (
                (last - int(total)) % 26 == 0 and last == ord(new) - 96 and (within is None) == (1 <= int(total) <= 26)
            )
        assert "".join(found[6] for found in lines if found) == problem.answer.strip('"')


def test_sequences_go_on_as_they_began() -> None:
    for problem in sample(TASKS["sequence"]):
        terms = [*numbers(problem.question), int(problem.answer)]
        steps = [b - a for a, b in itertools.pairwise(terms)]
        growing = {b - a for a, b in itertools.pairwise(steps)} == {1}
        last = problem.thought.split("\n")[-1]
        assert last == f"{terms[-2]}{steps[-1]:+}={terms[-1]}", problem
        assert growing or steps[2:] == steps[: len(steps) - 2], problem


@pytest.mark.parametrize("name", ["addition", "subtraction", "multiplication", "sequence"])
def test_each_step_of_the_arithmetic_is_true(name: str) -> None:
    for problem in sample(TASKS[name]):
        for left, right in (line.split("=") for line in problem.thought.split("\n") if "=" in line):
            column = re.fullmatch(r"\d-\d-\d", left)  # its result begins with what the next one lends
            lent = 10 * int(right[0]) if column else 0
            assert eval(re.sub(r"\b0+(\d)", r"\1", left)) + lent == int(right[1:] if lent else right), problem


def test_other_thoughts_compute() -> None:
    for problem in sample(TASKS["retrieval"]):
        assert problem.thought == re.findall(r'"([a-z])"[?.]$', problem.question)[0] + problem.answer
    for problem in sample(TASKS["counting"]):
        letters, counts = problem.thought[::2], problem.thought[1::2]
        assert letters == re.findall(r'"([a-z]+)"', problem.question)[-1] and counts[-1] == problem.answer
    for problem in sample(TASKS["reversal"]):
        forward, back = problem.thought.split("\n")
        assert (
            re.sub(r"\d", "", forward) == word_of(problem) and f'"{re.sub(chr(92) + "d", "", back)}"' == problem.answer
        )
    for problem in sample(TASKS["sorting"]):
        lines = [(int(number), numbers(done)) for number, done in (x.split(":") for x in problem.thought.split("\n"))]
        assert [number for number, _ in lines] == numbers(problem.question)
        assert all(sorted(done) == sorted(n for n, _ in lines[: i + 1]) for i, (_, done) in enumerate(lines))
        assert lines[-1][1] == numbers(problem.answer)
    for problem in sample(TASKS["logic"]):
        values = [line.split("=") for line in problem.thought.split("\n") if "=" in line]
        assert all(str(eval(left)) == right for left, right in values) and values[-1][1] == problem.answer
    for problem in sample(TASKS["comparison"]):
        lengths, *columns = problem.thought.split("\n")
        first, second, orders, digits = zip(*columns, strict=True)
        pair = [int("".join(first)), int("".join(second))]
        assert pair == numbers(problem.question) and int("".join(digits)) == int(problem.answer)
        assert eval(lengths.replace("=", "==")) and eval(f"{pair[0]}{orders[-1]}{pair[1]}")
        assert all(
            eval(f"{x}{o.replace('=', '==')}{y}")
            for x, y, o, before in zip(first, second, orders, ("=", *orders), strict=False)
            if before == "="
        )


def test_a_list_of_any_length_has_its_needle_once() -> None:
    (problem,) = TASKS["retrieval"].problems(1, seed=0, difficulty=400)
    letters = re.findall(r"\d([a-z])", problem.question)
    assert len(letters) == 401 and letters.count(re.findall(r'"([a-z])"[?.]$', problem.question)[0]) == 1
    assert problem.answer == expected(problem) and verify(problem, problem.reply) == (True, True)


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_do_not_meet(name: str) -> None:
    task = TASKS[name]
    held_out = task.problems(50, seed=1)
    train = {task.problem(random.Random(seed)).identity for seed in range(300)}
    assert len(held_out) == 50 and not train & {p.identity for p in held_out}
    assert all(split_of(p.identity) == "held-out" for p in held_out)
    assert all(verify(p, p.reply) == (True, True) for p in held_out)


@pytest.mark.parametrize("name", list(TASKS))
def test_the_seed_decides(name: str) -> None:
    task = TASKS[name]
    assert task.problems(8, seed=3) == task.problems(8, seed=3) != task.problems(8, seed=4)


def test_no_phrasing_or_order_smuggles_a_held_out_problem_into_training() -> None:
    task = TASKS["addition"]
    by_pair: dict[tuple[int, ...], set[str]] = {}
    for split in ("train", "held-out"):
        rng = random.Random(0)
        for _ in range(400):
            problem = task.problem(rng, 1, split)
            by_pair.setdefault(tuple(sorted(numbers(problem.question))), set()).add(split)
    assert all(len(splits) == 1 for splits in by_pair.values())


def test_mixture_covers_all_tasks_at_all_levels() -> None:
    problems = list(itertools.islice(mixture(list(TASKS.values()), seed=0), 2000))
    assert {p.task for p in problems} == set(TASKS)
    assert all(split_of(p.identity) == "train" for p in problems)
    digits = [len(str(max(numbers(p.question)))) for p in problems if p.task == "addition"]
    assert set(digits) == {1, 2, 3, 4} and sum(d == 4 for d in digits) > len(digits) / 3
    easy = list(itertools.islice(mixture([TASKS["addition"]], seed=0, difficulty=0.5), 200))
    assert max(len(str(max(numbers(p.question)))) for p in easy) == 2


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_a_share_of_the_hardest_problems(share: float) -> None:
    problems = itertools.islice(mixture([TASKS["addition"]], seed=0, hardest_share=share), 1000)
    digits = TASKS["addition"].difficulty
    hardest = sum(len(str(max(numbers(p.question)))) == digits for p in problems)
    assert abs(hardest / 1000 - (share + (1 - share) / digits)) < 0.04


def test_harder_than_shipped_as_far_as_there_are_such_problems() -> None:
    levels = {name: TASKS[name].level(1.2) for name in ("sorting", "addition", "sequence", "comparison")}
    assert levels == {"sorting": 6, "addition": 5, "sequence": 4, "comparison": 6}
    assert TASKS["sorting"].level(1e-3) == 1 and TASKS["sorting"].level(1.0) == TASKS["sorting"].difficulty
    harder = list(itertools.islice(mixture([TASKS["sorting"], TASKS["sequence"]], seed=0, difficulty=1.2), 200))
    assert max(len(numbers(p.question)) for p in harder if p.task == "sorting") == 7


PROBLEM = Problem("addition", "What is 27 + 58?", "7+8+0=15\n2+5+1=08", "85", "")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>\n7+8=15\n</think>\n85", (True, True)),
        ("<think>so</think> 85.", (True, True)),
        ("<think>so</think> **85**", (True, True)),
        (r"<think>so</think> $\boxed{85}$", (True, True)),
        ("<think>so</think> 84", (True, False)),
        ("<think>85</think>", (False, False)),  # no answer
        ("<think>85", (False, False)),  # cut off
        ("85", (False, True)),
        ("<think></think>85", (False, True)),  # no thought
        ("thought</think>85", (False, True)),  # a template may have opened the block
        ("so <think>x</think>85", (False, True)),
        ("<think>a</think><think>b</think>85", (False, True)),
        ("<think>a</think>85 or 84", (True, False)),
        ("", (False, False)),
    ],
)
def test_verification(reply: str, verdict: tuple[bool, bool]) -> None:
    assert verify(PROBLEM, reply) == verdict


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        (
            "85",
            [
                r"\(85\)",
                r"$$\boxed{85}$$.",
                "`85`",
                "27 + 58 = 85",
                "$27 + 58 = 85$",
                "The answer is 85.",
                "**85.**",
                "(85)",
                "27 + 58 = **85**",
                "27 + 58 = $85$",
                r"$27 + 58 = \boxed{85}$",
                r"27 + 58 = \(85\)",
                r"\[\boxed{85}\]",
                r"17 \times 5 = 85",
                "27 + 58 = 27 + 60 - 2 = 85.",
                "1,027 - 942 = 85",
                "**Answer:** 85",
                "**Answer**: 85",
                r"**Final Answer:** $\boxed{85}$",
                "The final answer is: **85**",
            ],
            [
                '8"5',
                "8$5",
                r"\boxed{8}5",
                r"\boxed{8}{5}",
                "8,5",
                "085",
                "-85",
                "85 = 58",
                "84 = 85",
                "27 + 57 = 85",
                "27 + 57 = 84 = 85",
                "9**9**9**9 = 85",
                "x = 85 = 85",
                "**8** or **5**",
                "'85",
                "85 86",
            ],
        ),
        ("1234", ["1,234", "**1,234**"], ["1, 234", "12,34", "1,2,34", "1 234"]),
        ("-7", ["\N{MINUS SIGN}7", "3 - 10 = -7"], ["7", "--7"]),
        (
            "3, 5, 7",
            ["[3, 5, 7]", "3 5 7", "3,5,7", "(3, 5, 7)", r"\[3,5,7]"[1:]],
            ["3, 57", "3, 5", "3,, 5, 7", "357"],
        ),
        (
            "True",
            ["true", r"\boxed{\text{True}}", "TRUE.", "(not False) = True", "not (True and False) = **True**"],
            ["Truer", "False", "True or False", "not True = True"],
        ),
        (
            '"abc"',
            ["abc", "'abc'", "“abc”", '"abc".', "Answer: abc"],
            ["ABC", '"ABC"', 'a"bc', '"abc', "abcd", '"a" "bc"'],
        ),
    ],
)
def test_answers_as_people_write_them(wanted: str, right: list[str], wrong: list[str]) -> None:
    """What surrounds a whole answer does not count; anything inside it does."""
    problem = Problem("any", "?", "", wanted, "")
    for answers, correct in ((right, True), (wrong, False)):
        assert [answer for answer in answers if verify(problem, answer).correct != correct] == []


def test_an_own_task_in_thirty_lines(tmp_path: Path) -> None:
    assert OWN_TASK.count("\n") <= 30
    file = tmp_path / "digit_sum.py"
    file.write_text(OWN_TASK)
    (task,) = tasks.find([str(file)])
    problem = task.problems(5, seed=0)[0]
    assert verify(problem, problem.reply) == (True, True)
    assert [t.name for t in tasks.find(["all", str(file)])] == [*TASKS, "digit-sum"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'addition'"):
        tasks.find(["adition"])
    with pytest.raises(UserError, match="no task is given"):
        tasks.find([])
    with pytest.raises(UserError, match="does not exist"):
        tasks.find([str(tmp_path / "none.py")])
    for name, text, message in (("empty", "", "no TASK"), ("broken", "1 / 0", "ZeroDivisionError")):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(UserError, match=message):
            tasks.find([str(tmp_path / f"{name}.py")])
    with pytest.raises(UserError, match="difficulty must be 1"):
        TASKS["addition"].problems(1, seed=0, difficulty=0)
    with pytest.raises(
        UserError, match=r"^task addition: draw of difficulty 5000 fails: ValueError: Exceeds the limit"
    ):
        TASKS["addition"].problems(1, seed=0, difficulty=5000)
    for old, new, message in (
        ("sum of {n}", "sum of {m}", "phrasing 'What is the digit sum of {m}.' fails: KeyError: 'm'"),
        ('instance["n"]', 'instance["m"]', "solve of 'What is the digit sum of [0-9]+.' fails: KeyError: 'm'"),
        ("str(total))", "total)", "solve of .* fails: TypeError: thought and answer must be strings"),
        ("10**difficulty)", "1)", "draw of difficulty 3 fails: ValueError: empty range"),
    ):
        own = tmp_path / "own.py"
        own.write_text(OWN_TASK.replace(old, new).replace(', "Add the digits of {n}."', ","))
        with pytest.raises(UserError, match=rf"^task digit-sum \({re.escape(str(own))}\): {message}"):
            tasks.find([str(own)])[0].problems(1, seed=0)
    for phrasings in ("What is {n}?", (), ("What is {n}?", 3)):
        with pytest.raises(UserError, match="task x: phrasings must be one or more strings, such as"):
            Task("x", 1, TASKS["addition"].draw, phrasings, TASKS["addition"].solve)  # pyright: ignore
    own = tmp_path / "own.py"
    own.write_text(OWN_TASK.replace("digit-sum", "sorting"))
    assert [task.file for task in tasks.find([str(own), str(own)])] == [str(own)]
    with pytest.raises(UserError, match=r"own\.py defines a second task 'sorting': give it a name of its own"):
        tasks.find(["all", str(own)])
    nothing = Task("nothing", 1, lambda rng, d: {"x": 1}, ("{x}",), TASKS["addition"].solve)
    empty_split = "train" if split_of("nothing [('x', 1)]") == "held-out" else "held-out"
    with pytest.raises(UserError, match=f"no {empty_split} problem"):
        nothing.problem(random.Random(0), 1, empty_split)
