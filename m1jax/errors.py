"""The one exception users see, and the wrapper that turns it into exit code 2."""

import contextlib
import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")

GARBAGE = 20_000, 20, 20  # how much of it there may be before it is looked for
BROKEN_PIPE = 141  # as the shell reports a program that SIGPIPE ended
# Of a GPU's memory, to be said before jax starts: its own 0.75 wastes the most. GPUs have 6% more than their name says.
FRACTION_NAME, FRACTION = "XLA_CLIENT_MEM_FRACTION", "0.94"
FRACTION_OLD_NAME = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax refuses both together
VERDICT = 30  # seconds that jax may take to name the process whose loss made another one's exchange fail: 3 heartbeats

_process: int | None = None  # which of several this is


class UserError(ValueError):
    """Bad input. Its text is one line that names the thing and the remedy."""


def several_processes(index: int) -> None:
    """Says that this is one process of several: a failure then ends it at once, and thereby the others.

    An orderly end would wait for the others, who wait for this one.
    """
    global _process
    _process = index


def alone() -> bool:
    """Whether this is the only process."""
    return _process is None


def main_guard(main: Callable[P, int | None]) -> Callable[P, NoReturn]:
    """Wraps a command's `main`: `UserError` becomes ``error: …`` on stderr and exit code 2, Ctrl-C exit code 130.

    What the file system refuses is bad input too. A reader of stdout that went away ends the command without a word.
    Garbage is looked for less often than Python would: jax makes a great many small objects while it traces, and all of
    them stay.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        gc.set_threshold(*GARBAGE)
        if FRACTION_OLD_NAME not in os.environ:
            os.environ.setdefault(FRACTION_NAME, FRACTION)
        try:
            _end(main(*args, **kwargs) or 0)
        except UserError as error:
            where = f"process {_process}: " if _process else ""
            _fail(f"error: {where}{' '.join(str(error).split())}", 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            _silence_stdout()
            _end(BROKEN_PIPE)
        except OSError as error:
            _silence_stdout()
            _fail(f"error: {error.filename or 'the output'}: {error.strerror or error}", 2)
        except Exception:
            if _process is None:
                raise
            time.sleep(VERDICT)
            _fail(f"process {_process}:\n{traceback.format_exc()}", 1)

    return run


def _fail(message: str, code: int) -> NoReturn:
    stderr = sys.stderr if _process is None else sys.__stderr__
    print(message, file=stderr, flush=True)
    _end(code)


def _end(code: int) -> NoReturn:
    if _process is None or code == 0:
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _silence_stdout() -> None:
    """After a failed write: keeps Python from complaining about it once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
