"""How processes that share a device take turns on it."""

import sys

READY = "ready"


def wait() -> None:
    """Says that all is compiled, and waits for the turn."""
    print(READY, flush=True)
    sys.stdin.readline()
