"""The one exception users see, and the wrapper that turns it into exit code 2."""

import _thread
import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, ParamSpec

P = ParamSpec("P")

GARBAGE = 20_000, 20, 20  # how much of it there may be before it is looked for
BROKEN_PIPE = 141  # as the shell reports a program that SIGPIPE ended
# Of a GPU's memory, to be said before jax starts: its own 0.75 wastes the most. GPUs have 6% more than their name says.
FRACTION_NAME, FRACTION = "XLA_CLIENT_MEM_FRACTION", "0.94"
FRACTION_OLD_NAME = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax refuses both together
INTERRUPTED = 130
VERDICT = 30  # seconds that jax may take to name the process whose loss made another one's exchange fail: 3 heartbeats

_GC_CALLBACK = "_xla_gc_callback"  # what jax has Python call at each garbage collection
_IMPORT = "<frozen importlib"  # the files of Python's own code that imports

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
            with _interrupts():
                _end(main(*args, **kwargs) or 0)
        except UserError as error:
            where = f"process {_process}: " if _process else ""
            _fail(f"error: {where}{' '.join(str(error).split())}", 2)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
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


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Handles Ctrl-C inside; not in a thread that is not the main one, nor where a shell has it ignored."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: `KeyboardInterrupt`, but where code that is not Python's would make something else of it."""
    if frame is not None and frame.f_code.co_name == _GC_CALLBACK:
        # Python drops exceptions raised there, and a signal that arrives inside XLA often lands there: try again.
        threading.Timer(0.02, _thread.interrupt_main).start()
        return
    while frame is not None:
        # jax's libraries crash, or raise an ImportError, where their import is broken off; nothing is at work yet.
        if frame.f_code.co_filename.startswith(_IMPORT):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


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
