"""The command line of `python -m m1jax.generate`: flags, what contradicts what, and the prompt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from m1jax import distributed
from m1jax.errors import UserError

MOST_TEXTS = 100_000  # of one prompt; more are an accident


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line, like every other bad input; flags are to be written out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` instead of ending the process."""
        raise UserError(f"{message} (--help lists the options)")


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The arguments, checked against each other. Raises `UserError`."""
    parser = Parser(prog="python -m m1jax.generate", description=description)
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="model folder, downloaded or converted (default: the small model that comes with the package)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute in (float32)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="hold the experts' weights in int8 or int4")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="add a LoRA adapter, m1jax's or PEFT's, to the weights"
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N,…", help="lay the model out on devices, e.g. data=1,expert=8,tensor=1; auto chooses"
    )
    _add_prompt_arguments(parser.add_argument_group("what to generate from"))
    _add_generation_arguments(parser.add_argument_group("how to generate (defaults as recommended for M1)"))
    distributed.add_arguments(parser)
    args = parser.parse_args(argv)
    _check_modes(args)
    if args.json_schema is not None and not args.json_schema.lstrip().startswith("{"):
        args.json_schema = _read(Path(args.json_schema))
    return args


def _add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", metavar="TEXT", help="the prompt; - reads it from stdin (less one newline at its end)"
    )
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the prompt (the same)")
    source.add_argument("--interactive", action="store_true", help="a conversation: one message per line")
    source.add_argument(
        "--input", type=Path, metavar="FILE", help="JSONL, per line prompt or messages, and options of its own"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="JSONL, continued if a run was broken off")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--raw", action="store_true", help="feed the prompt as it stands, without chat template")


def _add_generation_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-tokens", type=int, default=4096, metavar="N", help="generate at most N tokens (4096)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (1.0)")
    add(
        "--top-p", type=float, default=0.95, metavar="P", help="keep the likeliest tokens of total probability P (0.95)"
    )
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens (0: all)")
    add("--min-p", type=float, default=0.0, metavar="P", help="keep tokens P times as likely as the likeliest (0: all)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 discourages repetition (1: off)")
    add("--greedy", action="store_true", help="always the likeliest token")
    add(
        "--seed",
        type=int,
        help="the same seed gives the same text (random; with --input 0, from which each line has its own)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    add("-n", type=int, default=1, metavar="N", help="generate N texts (1)")
    add("--batch-size", type=int, default=8, metavar="B", help="at most B texts at once (8)")
    thinking = group.add_mutually_exclusive_group()
    thinking.add_argument("--thinking-budget", type=int, metavar="N", help="end thinking after N tokens")
    thinking.add_argument("--no-thinking", action="store_true", help="answer without thinking")
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="tell each token's log-probability, and the K likeliest tokens (0 to 20; with --json or --output)",
    )
    add("--json-schema", metavar="SCHEMA", help="hold the answer to a JSON Schema: the schema, or a file with it")
    add("--json", action="store_true", help="print one JSON object with text and figures")


def _check_modes(args: argparse.Namespace) -> None:
    """Flags that contradict each other."""
    contradictions = [
        (args.input is not None and args.output is None, "--input needs --output"),
        (args.output is not None and args.input is None, "--output goes with --input"),
        (args.json and args.interactive, "--json and --interactive contradict each other"),
        (args.json and args.input is not None, "--json and --input contradict each other: --output is JSON already"),
        (
            args.logprobs is not None and not args.json and args.input is None,
            "--logprobs are told in JSON: give --json, or --input and --output",
        ),
        (args.interactive and args.raw, "--interactive needs the chat template: drop --raw"),
        (args.interactive and args.n != 1, "--interactive gives one reply per message: drop -n"),
        (args.greedy and bool(args.temperature), "--greedy and --temperature above 0 contradict each other: drop one"),
        (args.n > MOST_TEXTS, f"n must be at most {MOST_TEXTS}, not {args.n}"),
        (args.batch_size < 1, f"batch-size must be 1 or more, not {args.batch_size}"),
        (args.input is not None and _same(args.input, args.output), "--input and --output are the same file"),
    ]
    for wrong, message in contradictions:
        if wrong:
            raise UserError(message)


def _same(a: Path, b: Path | None) -> bool:
    return b is not None and a.exists() and b.exists() and a.samefile(b)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt that `--prompt` or `--prompt-file` gives. Raises `UserError` if it cannot be read."""
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    return _read(args.prompt_file).removesuffix("\n").removesuffix("\r")


def _read(file: Path | None) -> str:
    """The text of a file, or of stdin. Raises `UserError` if it cannot be read."""
    name = "stdin" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not valid UTF-8 (byte {error.start}): save it as UTF-8") from None
