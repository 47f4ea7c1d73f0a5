"""Tasks with generators and verifiers, to train by rule and to evaluate. A task of your own is a file with `TASK`."""

import dataclasses
import difflib
import runpy
from collections.abc import Sequence
from pathlib import Path

from m1jax.errors import UserError
from m1jax.tasks.arithmetic import ADDITION, MULTIPLICATION, SUBTRACTION
from m1jax.tasks.letters import CIPHER, COUNTING, REVERSAL
from m1jax.tasks.logic import LOGIC
from m1jax.tasks.numbers import COMPARISON, SEQUENCE, SORTING
from m1jax.tasks.retrieval import RETRIEVAL
from m1jax.tasks.task import Instance, Problem, Solution, Split, Task, Verdict, mixture, split_of, verify

__all__ = [
    "TASKS",
    "Instance",
    "Problem",
    "Solution",
    "Split",
    "Task",
    "Verdict",
    "find",
    "mixture",
    "split_of",
    "verify",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ADDITION,
        SUBTRACTION,
        MULTIPLICATION,
        COMPARISON,
        SORTING,
        COUNTING,
        REVERSAL,
        CIPHER,
        LOGIC,
        SEQUENCE,
        RETRIEVAL,
    )
}


def find(names: Sequence[str]) -> list[Task]:
    """Tasks by name, "all" of the built-in ones, or the `TASK` of a Python file (`my_task.py`).

    Raises:
      UserError: no task of that name, a file that cannot be run, or one without a `TASK`.
    """
    out: dict[str, Task] = {}
    for name in names:
        for task in TASKS.values() if name == "all" else (_one(name),):
            if out.setdefault(task.name, task).file != task.file:
                raise UserError(f"{name} defines a second task {task.name!r}: give it a name of its own")
    if not out:
        raise UserError(f"no task is given: name some of {', '.join(TASKS)}, or all")
    return list(out.values())


def _one(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".py"):
        near = difflib.get_close_matches(name, [*TASKS, "all"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}, all, or give a .py file"
        raise UserError(f"unknown task {name!r}: {hint}")
    if not Path(name).is_file():
        raise UserError(f"{name} does not exist: give a file that defines TASK")
    try:
        found = runpy.run_path(name).get("TASK")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{name} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(found, Task):
        raise UserError(f"{name} defines no TASK: it must be an m1jax.tasks.Task")
    return dataclasses.replace(found, file=name)
