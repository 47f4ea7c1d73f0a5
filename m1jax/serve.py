"""Serves a MiniMax-M1 model to OpenAI's clients.

    python -m m1jax.serve --model DIR --dtype bfloat16
    curl http://localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is 27 + 58?"}]}'

Chat completions and completions, in one piece or streamed, with thinking as reasoning_content and tool calls; texts of
all who ask are generated together. Exit code 2 is bad input, 130 Ctrl-C, which ends the texts in the making.
"""

import argparse
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m1jax.arguments import Parser
from m1jax.errors import UserError, main_guard
from m1jax.remote import read_key

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from m1jax.server.service import Service

BACKLOG = 2048  # clients that may wait to be taken in
PATIENCE = 5  # seconds that clients have to read what is left when the server ends


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises `UserError`."""
    parser = Parser(prog="python -m m1jax.serve", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model folder (default: the small model that comes with the package)")
    add("--name", metavar="MODEL", help="what clients call it (the folder's name)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute in (float32)")
    add("--quantize", choices=("int8", "int4"), help="hold the experts' weights in int8 or int4")
    add("--adapter", type=Path, metavar="DIR", help="add a LoRA adapter, m1jax's or PEFT's, to the weights")
    add("--mesh", metavar="AXIS=N,…", help="lay the model out on this process's devices, e.g. expert=8; auto chooses")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too (127.0.0.1)")
    add("--port", type=int, default=8000, metavar="P", help="port to listen on (8000)")
    add("--api-key-file", type=Path, metavar="FILE", help="file with a key that clients must send as bearer token")
    add("--batch-size", type=int, default=8, metavar="B", help="at most B texts at once (8)")
    add(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="at most N texts wait, then clients are sent away (256)",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help="at most N tokens of prompt and reply, with room for so many from the start (the model's; room grows)",
    )
    add(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="with --context: room for keys and values of N tokens in all, in pages of 256; where it ends the youngest "
        "texts wait, and are read again (batch size x context)",
    )
    add(
        "--prefix-cache",
        type=int,
        metavar="N",
        help="with --context: remember N beginnings of prompts, of 256 tokens or more; a prompt that has one is read "
        "from its end on (2 x batch size: each conversation wants one, and what they share; none on a mesh with seq)",
    )
    add(
        "--warm-up",
        action="store_true",
        help="with --context: compile before listening what texts need later (but for n > 1 and logprobs)",
    )
    args = parser.parse_args(argv)
    if args.warm_up and args.context is None:
        raise UserError("--warm-up goes with --context, which makes texts of one size: give it, too")
    if args.cache_tokens is not None and args.context is None:
        raise UserError("--cache-tokens goes with --context, the most tokens of one text: give it, too")
    if args.prefix_cache is None:
        args.prefix_cache = 0 if args.context is None else 2 * args.batch_size
    elif args.context is None:
        raise UserError("--prefix-cache goes with --context, the most tokens of one text: give it, too")
    for name, least in (("batch-size", 1), ("max-waiting", 0), ("prefix-cache", 0)):
        value = getattr(args, name.replace("-", "_"))
        if value < least:
            raise UserError(f"{name} must be {least} or more, not {value}")
    if not 0 <= args.port <= 65535:
        raise UserError(f"port must be from 0 to 65535, not {args.port}")
    return args


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `python -m m1jax.serve --help`."""
    args = parse(argv)
    key = None if args.api_key_file is None else read_key(args.api_key_file)
    if key == "":
        raise UserError(f"{args.api_key_file} is empty: put a key into it, or drop --api-key-file")
    try:
        import uvicorn  # noqa: F401, which the next does without

        from m1jax.server.app import Server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'm1jax[serve]'") from None
    from m1jax.config import M1Config, check_model_folder
    from m1jax.engine import check_cache_tokens, check_own_context
    from m1jax.loading import load
    from m1jax.nano import default_model
    from m1jax.prompt import Options, Prompter
    from m1jax.runtime import memory_errors, use_compilation_cache
    from m1jax.server.service import Service
    from m1jax.tokenizer import Tokenizer

    folder = args.model or default_model()
    check_model_folder(folder)
    name = args.name or (folder.resolve().name if args.model else "m1-nano")
    with _bound(args.host, args.port) as bound, memory_errors():
        if args.context is not None:
            check_own_context(args.context, M1Config.from_file(folder))
        if args.cache_tokens is not None:
            check_cache_tokens(args.cache_tokens, args.context)
        tokenizer = Tokenizer.load(folder)
        _ = Prompter(tokenizer).template  # complains before the weights are read
        use_compilation_cache()
        model = load(folder, args.dtype, args.quantize, mesh=args.mesh, adapter=args.adapter)
        limits = args.batch_size, args.max_waiting, args.context, args.cache_tokens, args.prefix_cache
        service = Service(model, tokenizer, *limits)
        service.engine.check_room(args.batch_size)  # now, and not when someone asks
        if args.warm_up:
            print(f"compiling for up to {args.batch_size} texts…", file=sys.stderr, flush=True)
            service.engine.warm_up(args.batch_size)

        app = Server(service, name, Options(max_tokens=service.engine.context), key).app
        with _refused(args.host, args.port):
            bound.listen(BACKLOG)
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
        _until_told(app, service, bound)
    return 0


def _until_told(app: "Starlette", service: "Service", listening: socket.socket) -> None:
    """Serves until a signal, then ends the texts, for whose streams it would wait. Raises `KeyboardInterrupt`."""
    import uvicorn

    class Until(uvicorn.Server):
        """Says first that it ends."""

        interrupted = False

        def handle_exit(self, sig: int, frame: object) -> None:
            self.interrupted = sig == signal.SIGINT
            service.close()
            super().handle_exit(sig, frame)  # pyright: ignore[reportArgumentType]

    server = Until(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="off"))
    try:
        server.run(sockets=[listening])
    finally:
        service.close()
        service.join(PATIENCE)
    if server.interrupted:  # asyncio does not always say so
        raise KeyboardInterrupt


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, which does not listen yet. Raises `UserError`, before the weights are read."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _refused(host, port):
            bound.bind((host, port))
        yield bound


@contextlib.contextmanager
def _refused(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None


if __name__ == "__main__":
    main()
