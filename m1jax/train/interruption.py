"""Ctrl-C and SIGTERM, held back until a step has ended."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether one of the signals came.

    A second one does at once what it always does. Of several processes each would hear it in another step: there the
    first does, too.
    """

    def __init__(self) -> None:
        self.came = False

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
            self.came = True
            restore()
            os.write(2, b"\ninterrupted: ends with a checkpoint after this step; once more: at once\n")  # print may not

        for number in SIGNALS:
            signal.signal(number, take)
        try:
            yield
        finally:
            restore()
