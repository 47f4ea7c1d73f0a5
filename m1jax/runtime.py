"""The process around the model: compilation cache, memory figures, Ctrl-C, broken pipes and exhausted memory.

Imports jax only where it is used: Ctrl-C is to be handled while jax is being imported.
"""

import contextlib
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from m1jax import errors
from m1jax.errors import UserError


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, in the user's cache folder, unless jax is told otherwise already.

    A folder that cannot be written only means that every start compiles.
    """
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "m1jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def peak_memory() -> dict[str, int]:
    """The most memory used so far, in bytes: of the process, and of the first accelerator if it keeps count."""
    import jax

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = {"process": peak if sys.platform == "darwin" else peak * 1024}
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return out if device is None else {**out, "device": device}


class Interrupts:
    """Ctrl-C: at once, or, while text is generated, after the current step.

    The device's state is handed from step to step; ending between two steps keeps it whole. So the first Ctrl-C of a
    `caught` stretch only raises a flag, the second one `KeyboardInterrupt`. Of several processes one that stops between
    steps would leave the others waiting: there the first one ends the process, and thereby the others.
    """

    def __init__(self) -> None:
        self.requested = False
        self._catching = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Interrupts"]:
        """Handles Ctrl-C inside; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """The stretch of work; the flag is lowered at its beginning."""
        self.requested, self._catching = False, True
        try:
            yield
        finally:
            self._catching = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._catching and not self.requested and errors.alone():
            self.requested = True
        else:
            errors.interrupt(number, frame)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns exhausted memory into a `UserError`."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError("out of memory: use --dtype bfloat16, fewer tokens or a smaller --batch-size") from None


def open_streams() -> None:
    """Puts closed standard streams in order (`>&-`), and has stdout replace what its encoding cannot write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
