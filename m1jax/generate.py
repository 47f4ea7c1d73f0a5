"""Generates text with a MiniMax-M1 model.

    python -m m1jax.generate --prompt "What is 27 + 58?"
    python -m m1jax.generate --model DIR --prompt "…"
    python -m m1jax.generate --model DIR --interactive
    python -m m1jax.generate --model DIR --input in.jsonl --output out.jsonl

Text goes to stdout, figures and errors to stderr. Exit code 2 is bad input, 130 Ctrl-C (what was generated is kept).
"""

import sys
from collections.abc import Sequence

from m1jax import distributed
from m1jax.arguments import parse
from m1jax.errors import UserError, main_guard
from m1jax.runtime import Interrupts, memory_errors, open_streams


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `python -m m1jax.generate --help`."""
    open_streams()
    with Interrupts().installed() as interrupts:
        return _run(argv, interrupts)


def _run(argv: Sequence[str] | None, interrupts: Interrupts) -> int:
    args = parse(argv, __doc__ or "")
    distributed.check(args)
    if args.coordinator is not None and (args.interactive or args.prompt == "-"):
        raise UserError("several processes cannot share stdin: give --prompt, --prompt-file or --input")
    distributed.start(args)
    # Importing jax takes seconds; --help comes before, and Ctrl-C is handled meanwhile.
    from m1jax import modes
    from m1jax.config import M1Config
    from m1jax.engine import end_tokens
    from m1jax.nano import default_model
    from m1jax.prompt import Options, Prompter
    from m1jax.terminal import note
    from m1jax.tokenizer import Tokenizer

    if args.coordinator is not None and args.input is None:
        args.seed = distributed.agreed_seed(args.seed)
    options = Options.of(args)
    args.model = args.model or default_model()
    if not args.model.is_dir():
        raise UserError(f"{args.model} is not a folder: give one with a model's config.json")
    with memory_errors():
        # Whatever can be refused is, before the weights are read.
        config = M1Config.from_file(args.model)
        prompter = Prompter(Tokenizer.load(args.model))
        if not args.raw and args.input is None:
            _ = prompter.template  # complains: who is refused needs no warning
        if not options.stop and not end_tokens(config, prompter.tokenizer):
            note(
                f"warning: {args.model} names no token that ends a text, which then goes on to --max-tokens: add "
                "eos_token to tokenizer_config.json, or give --stop",
                sys.stderr,
            )
        if args.interactive:
            return modes.converse(args, options, prompter, interrupts)
        return (modes.single if args.input is None else modes.batch)(args, options, prompter, config, interrupts)


if __name__ == "__main__":
    main()
