"""Ctrl-C and SIGTERM, held back until a step has ended; of several processes, until they all end the same one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether one of the signals came.

    A second one does at once what it always does. Of several processes each would hear a signal in another step: jax's
    coordination service hears SIGTERM, whichever gets it, and names a step for all. Ctrl-C ends them at once.
    """

    def __init__(self) -> None:
        self._came = False

    def ends(self, step: int) -> bool:
        """Whether the run ends after this step; to be asked after each, once, in every process."""
        return self._came if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Holds the signals back for as long as it lasts."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def take(*_: object) -> None:
            self._came = True
            restore()
            os.write(2, b"\ninterrupted: ends with a checkpoint after this step; once more: at once\n")  # print may not

        for number in SIGNALS:
            signal.signal(number, take)
        try:
            yield
        finally:
            restore()
