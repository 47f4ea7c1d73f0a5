"""The three ways to run `python -m m1jax.generate`: a prompt, a conversation, a JSONL file. They return exit codes."""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from m1jax import distributed
from m1jax.arguments import read_prompt
from m1jax.chat import Chat
from m1jax.config import M1Config
from m1jax.engine import Engine, Stats
from m1jax.errors import INTERRUPTED, UserError
from m1jax.jsonl import describe, generate_lines, named_precision, open_output, read_lines
from m1jax.loading import load, open_parameters
from m1jax.prompt import Options, Prompter
from m1jax.reply import Reply, check_context
from m1jax.runtime import Interrupts, use_compilation_cache
from m1jax.terminal import Printer, ending, figures, note, rates
from m1jax.tokenizer import Tokenizer


def single(
    args: argparse.Namespace, options: Options, prompter: Prompter, config: M1Config, interrupts: Interrupts
) -> int:
    """Streams the text for one prompt, or prints it as JSON."""
    request = prompter.plain(read_prompt(args), options)
    check_context(len(request.tokens), config.max_position_embeddings)
    distributed.check_same("prompt", request)
    engine, seconds = start(args, prompter.tokenizer, interrupts)
    found: dict[int, Reply] = {}
    printer = None if args.json else Printer(sys.stdout, request.n)
    with interrupts.caught():
        try:
            for event in engine.generate([request], max_rows=args.batch_size):
                found[event.reply.sample] = event.reply
                if printer is not None:
                    printer.show(event)
        finally:
            if printer is not None:
                printer.end_line()
    replies = [found[sample] for sample in sorted(found)]
    if args.json:
        samples = [describe(reply) for reply in replies]
        stats = {**rates(engine.stats), "load_seconds": round(seconds, 3)}
        out = {"text": samples[0]["text"], "samples": samples, "seed": options.seed, "stats": stats}
        print(json.dumps(out, ensure_ascii=False), flush=True)
    else:
        _figures(replies, options, engine.stats, seconds)
    return INTERRUPTED if any(reply.finish == "interrupted" for reply in replies) else 0


def converse(args: argparse.Namespace, options: Options, prompter: Prompter, interrupts: Interrupts) -> int:
    """Replies to each line of stdin; Ctrl-C ends a reply, the end of stdin the conversation."""
    _ = prompter.template  # complains before the weights are read
    engine, seconds = start(args, prompter.tokenizer, interrupts)
    chat, terminal = Chat(engine, options), sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (gives input() a history and line editing)

        note("Ctrl-C ends a reply, Ctrl-D the conversation.", sys.stderr)
    while True:
        try:
            message = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt) as end:
            if terminal:
                print()
            return 0 if isinstance(end, EOFError) else INTERRUPTED
        except UnicodeDecodeError:
            raise UserError("stdin is not valid UTF-8") from None
        if not message.strip():
            continue
        engine.stats = Stats()
        try:
            reply = _turn(chat, message, interrupts)
        except UserError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
        else:
            _figures([reply], options, engine.stats, seconds)
            seconds = None


def _turn(chat: Chat, message: str, interrupts: Interrupts) -> Reply:
    """Streams the reply to a message."""
    printer, reply = Printer(sys.stdout), None
    with interrupts.caught():
        try:
            for event in chat.send(message):
                reply = event.reply
                printer.show(event)
        finally:
            printer.end_line()
    assert reply is not None, "a request ends with an event"
    return reply


def batch(
    args: argparse.Namespace, options: Options, prompter: Prompter, config: M1Config, interrupts: Interrupts
) -> int:
    """Generates for each line of `--input` what `--output` lacks."""
    lines = read_lines(args.input, options, prompter, config.max_position_embeddings, args.adapter)
    total = sum(line.request.n for line in lines)
    with open_output(args.output, lines) as output:
        if len(output.done) < total:
            engine, seconds = start(args, prompter.tokenizer, interrupts)
            bar = tqdm(total=total, initial=len(output.done), unit="text", dynamic_ncols=True, file=sys.stderr)
            with bar, interrupts.caught():
                for _ in generate_lines(engine, lines, output, args.batch_size):
                    bar.update()
            note(figures(engine.stats, seconds), sys.stderr)
        else:  # of what was asked for?
            output.continue_in(named_precision(args.dtype, open_parameters(args.model, args.quantize).quantize))
        done = len(output.done)
        if done == total:
            output.sort()
    if done < total:
        note(f"interrupted: {args.output} has {done} of {total} texts, repeat the command to continue", sys.stderr)
        return INTERRUPTED
    note(f"{args.output} has all {total} texts", sys.stderr)
    return 0


def start(args: argparse.Namespace, tokenizer: Tokenizer, interrupts: Interrupts) -> tuple[Engine, float]:
    """Loads the model: an engine, and the seconds it took."""
    use_compilation_cache()
    begin = time.perf_counter()
    model = load(args.model, args.dtype, args.quantize, mesh=args.mesh, adapter=args.adapter)
    engine = Engine(model, tokenizer, cancelled=lambda: interrupts.requested)
    return engine, time.perf_counter() - begin


def _figures(replies: Sequence[Reply], options: Options, stats: Stats, seconds: float | None) -> None:
    """The line under a text: speeds, the seed to repeat it with, and why it ended."""
    parts = [figures(stats, seconds)]
    if options.sampling.temperature > 0:
        parts.append(f"seed {options.seed}")
    note(" · ".join([*parts, *filter(None, [ending(replies)])]), sys.stderr)
