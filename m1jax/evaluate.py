"""Accuracy on held-out problems, with confidence intervals.

    python -m m1jax.evaluate --model DIR --task all
    python -m m1jax.evaluate --task addition --task my_task.py --difficulty 3 --json
    python -m m1jax.evaluate --against http://localhost:8000/v1 --task all

Replies are greedy, problems are the same for every model. `--against` asks an OpenAI-compatible server. Without
`--model` the model that comes with the package is evaluated. Exit code 2 is bad input.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m1jax.arguments import Parser
from m1jax.errors import UserError, main_guard
from m1jax.tasks import Problem, Task, find, verify

Z = 1.959963984540054  # two-sided 95 %

# From problems to (reply or why there is none, whether the model ended it itself) of each.
Answers = Callable[[Sequence[Problem]], Sequence[tuple[str | UserError, bool]]]


class Score(NamedTuple):
    """How a model did on one task; shares with `wilson` intervals of 95 %."""

    task: str
    difficulty: int
    problems: int
    correct: int
    well_formed: int
    seconds: float
    cut_off: int = 0  # replies that had not ended when their tokens did
    unanswered: int = 0  # questions without a reply
    reason: str = ""  # why the first of them has none

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.correct, self.problems)


def wilson(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927): right also near 0 and 1 and for few trials."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes: expected 0 to {trials} of at least one trial, got {successes}")
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def score(task: Task, problems: Sequence[Problem], difficulty: int, answers: Answers) -> Score:
    """Asks the problems and counts; a reply that was cut off is wrong, and one that never came."""
    start = time.perf_counter()
    replies = answers(problems)
    seconds = time.perf_counter() - start
    reasons = [str(text) for text, _ in replies if isinstance(text, UserError)]
    verdicts = [
        verify(problem, text)
        for problem, (text, ended) in zip(problems, replies, strict=True)
        if ended and not isinstance(text, UserError)
    ]
    return Score(
        task.name,
        difficulty,
        len(problems),
        correct=sum(verdict.correct for verdict in verdicts),
        well_formed=sum(verdict.well_formed for verdict in verdicts),
        seconds=seconds,
        cut_off=len(problems) - len(verdicts) - len(reasons),
        unanswered=len(reasons),
        reason=reasons[0] if reasons else "",
    )


# --- a model of our own --------------------------------------------------------------------------------------------


class Local:
    """Greedy replies of a model on this machine, many at once.

    Args:
      model: the model.
      prompter: of its tokenizer.
      window: the most tokens of a reply.
      rows: replies generated at once; rounded up to what the model's mesh divides.

    Raises:
      UserError: from a call, if a prompt and window exceed the model's context, or the model computes NaN.
    """

    def __init__(self, model: Any, prompter: Any, window: int, rows: int) -> None:
        self.model, self.prompter, self.window, self.rows = model, prompter, window, rows

    def __call__(self, problems: Sequence[Problem]) -> list[tuple[str, bool]]:
        """Reply and whether it ended, of each problem."""
        import jax
        import numpy as np

        from m1jax.prompt import Options
        from m1jax.rl.rollout import check_finite, padded_prompts, rollout, sampling_rows
        from m1jax.sharding.mesh import mesh_of
        from m1jax.sharding.region import on_mesh_of
        from m1jax.sharding.rules import shards

        tokenizer = self.prompter.tokenizer
        eos = np.asarray(eos_ids(self.model.config, tokenizer), np.int32)
        prompts = [self.prompter.plain(problem.question, Options()).tokens for problem in problems]
        # Prompts of similar length go together: their state grows with the longest.
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        out: dict[int, tuple[str, bool]] = {}
        embedding = self.model.embed.get_value()
        mesh = mesh_of(embedding)
        ways = 1 if mesh is None else shards(mesh, "batch")
        rows = -(-min(self.rows, len(prompts)) // ways) * ways
        for first in range(0, len(order), rows):
            part = order[first : first + rows]
            padded = [prompts[n] for n in part] + [prompts[part[0]]] * (rows - len(part))
            tokens, lengths = padded_prompts(padded, 64)
            greedy = sampling_rows([0] * rows, 1, 0.0)
            with on_mesh_of(embedding):
                found = jax.device_get(
                    rollout(self.model, tokens, lengths, greedy, eos, self.window, replies=1, window=self.window)
                )
            check_finite(self.model, padded, found)
            for row, n in enumerate(part):
                ids = found.tokens[row, : found.lengths[row]].tolist()
                out[n] = written(tokenizer, ids, bool(found.ended[row])), bool(found.ended[row])
        return [out[n] for n in range(len(prompts))]


def written(tokenizer: Any, ids: Sequence[int], ended: bool) -> str:
    """A reply as it is judged: every token counts, special ones too, but for that which ended it."""
    return tokenizer.decode(ids[:-1] if ended else ids, keep=None)


def eos_ids(config: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply. Raises `UserError` if there is none: no reply would end."""
    from m1jax.engine import end_tokens

    ids = end_tokens(config, tokenizer)
    if not ids:
        raise UserError(f"{tokenizer.folder} names no token that ends a reply: add eos_token to tokenizer_config.json")
    return sorted(ids)


def open_local(
    folder: Path,
    dtype: str,
    window: int,
    rows: int,
    quantize: Any = None,
    mesh: str | None = None,
    adapter: Path | None = None,
) -> Local:
    """Loads a model; `quantize`, `mesh` and `adapter` as for `m1jax.load`. Raises `UserError`."""
    from m1jax.config import check_model_folder
    from m1jax.loading import load
    from m1jax.prompt import Prompter
    from m1jax.runtime import use_compilation_cache
    from m1jax.tokenizer import Tokenizer

    check_model_folder(folder)
    prompter = Prompter(Tokenizer.load(folder))
    _ = prompter.template
    use_compilation_cache()
    return Local(load(folder, dtype, quantize, mesh=mesh, adapter=adapter), prompter, window, rows)


# --- the command line ----------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The command line."""
    out = Parser(prog="python -m m1jax.evaluate", description=__doc__)
    add = out.add_argument
    add("--model", type=Path, metavar="DIR", help="model folder (default: the model that comes with the package)")
    add("--against", metavar="URL", help="ask this OpenAI-compatible server instead, e.g. http://localhost:8000/v1")
    add("--name", metavar="MODEL", help="with --against: the model to ask for (default: the first it lists)")
    add("--instruction", default="", metavar="TEXT", help="with --against: put after each question, e.g. about format")
    add("--api-key-file", type=Path, metavar="FILE", help="with --against: file with the key to send")
    add("--task", action="append", metavar="NAME", help="a task, all (default), or a .py file that defines TASK")
    add("--problems", type=int, default=200, metavar="N", help="problems per task (200)")
    add("--difficulty", type=int, metavar="D", help="instead of each task's shipped difficulty")
    add("--max-tokens", type=int, default=256, metavar="N", help="the most tokens of a reply (256)")
    add("--batch-size", type=int, default=64, metavar="B", help="replies at once (64)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute in (float32)")
    add("--quantize", choices=("int8", "int4"), help="hold the experts' weights in int8 or int4")
    add("--adapter", type=Path, metavar="DIR", help="add a LoRA adapter, m1jax's or PEFT's, to the weights")
    add("--mesh", metavar="AXIS=N,…", help="lay the model out on devices, e.g. data=1,expert=8,tensor=1; auto chooses")
    add("--seed", type=int, default=0, help="of the problems (0)")
    add("--json", action="store_true", help="print one JSON object")
    return out


def _check(args: argparse.Namespace) -> None:
    contradictions = [
        (args.model is not None and args.against is not None, "--model and --against contradict each other: drop one"),
        (args.against is not None and args.quantize is not None, "--quantize is for a model here: drop --against"),
        (args.against is not None and args.adapter is not None, "--adapter is for a model here: drop --against"),
        (args.against is not None and args.mesh is not None, "--mesh is for a model here: drop --against"),
        (args.against is None and args.name is not None, "--name goes with --against"),
        (args.against is None and args.instruction != "", "--instruction goes with --against"),
        (args.against is None and args.api_key_file is not None, "--api-key-file goes with --against"),
        (args.problems < 1, f"problems must be 1 or more, not {args.problems}"),
        (args.max_tokens < 1, f"max-tokens must be 1 or more, not {args.max_tokens}"),
        (args.batch_size < 1, f"batch-size must be 1 or more, not {args.batch_size}"),
    ]
    for wrong, message in contradictions:
        if wrong:
            raise UserError(message)


def table(scores: Sequence[Score]) -> str:
    """The scores for people."""
    lines = [f"{'task':<16} {'level':>5} {'problems':>8}  {'accuracy':>8}  {'95 % interval':<17} {'format':>7}"]
    for s in scores:
        low, high = s.interval
        lines.append(
            f"{s.task:<16} {s.difficulty:>5} {s.problems:>8}  {s.accuracy:>8.1%}  "
            f"{f'{low:.1%} to {high:.1%}':<17} {s.well_formed / s.problems:>7.1%}"
        )
    return "\n".join(lines)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `python -m m1jax.evaluate --help`."""
    args = parser().parse_args(argv)
    _check(args)
    tasks = find(args.task or ["all"])
    levels = {t.name: t.difficulty if args.difficulty is None else args.difficulty for t in tasks}
    sets = {t.name: t.problems(args.problems, args.seed, levels[t.name]) for t in tasks}  # complains before loading
    if args.against is not None:
        from m1jax.remote import Remote

        answers: Answers = Remote.open(
            args.against, args.name, args.api_key_file, args.instruction, args.max_tokens, args.batch_size
        )
    else:
        from m1jax.nano import default_model

        answers = open_local(
            args.model or default_model(),
            args.dtype,
            args.max_tokens,
            args.batch_size,
            args.quantize,
            args.mesh,
            args.adapter,
        )
    scores: list[Score] = []
    try:
        for task in tasks:
            scores.append(score(task, sets[task.name], levels[task.name], answers))
            if not args.json and sys.stderr.isatty():
                print(f"{task.name}: {scores[-1].accuracy:.1%} in {scores[-1].seconds:.1f} s", file=sys.stderr)
    finally:  # what is judged stays, if the server goes
        if scores:
            _print(scores, args)
    return 0


def _print(scores: Sequence[Score], args: argparse.Namespace) -> None:
    asked = sum(s.problems for s in scores)
    unanswered = sum(s.unanswered for s in scores)
    if unanswered:
        reason = " ".join(next(s.reason for s in scores if s.unanswered).split())
        print(
            f"warning: {unanswered} of {asked} questions were not answered and count as wrong; the first: {reason}",
            file=sys.stderr,
        )
    cut_off = sum(s.cut_off for s in scores)
    if cut_off:
        print(
            f"warning: {cut_off} of {asked} replies were cut off after {args.max_tokens} tokens and count as wrong: "
            "raise --max-tokens if they would have ended",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"scores": [{**s._asdict(), "accuracy": s.accuracy, "interval": s.interval} for s in scores]}))
    else:
        print(table(scores))


if __name__ == "__main__":
    main()
