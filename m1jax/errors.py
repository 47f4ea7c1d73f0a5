"""The one exception users see, and the wrapper that turns it into exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class UserError(ValueError):
    """Bad input. Its text is one line that names the thing and the remedy."""


def main_guard(main: Callable[P, int | None]) -> Callable[P, NoReturn]:
    """Wraps a command's `main`: `UserError` becomes ``error: …`` on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        try:
            sys.exit(main(*args, **kwargs) or 0)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
