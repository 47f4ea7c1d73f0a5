"""Where processes wait for each other before jax does: one that waits in vain in jax ends with a C++ stack trace.

Process 0 listens at the coordinator's port. Each of the others comes, says who it is, and waits for the word that all
are there; then the port is left to jax's coordination service.
"""

import contextlib
import re
import socket
import time

from m1jax.errors import UserError

_RETRY = 0.2  # seconds between two attempts to reach process 0
_HELLO = 2.0  # seconds that one who has come may take to say who it is
_GO = b"go\n"


def meet(address: str, count: int, index: int, seconds: float) -> None:
    """Returns when all of `count` processes have called it, this one as number `index`.

    Args:
      address: HOST:PORT of process 0.
      count: how many processes there are.
      index: which one this is.
      seconds: how long to wait.

    Raises:
      UserError: the port of process 0 is taken, it or others did not come in time, or they say different counts.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _receive(address, int(port), count, deadline)
    else:
        _come(host.strip("[]"), int(port), f"m1jax {index} {count}\n".encode(), deadline)


def _receive(address: str, port: int, count: int, deadline: float) -> None:
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count, dualstack_ipv6=both
        )
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port} ({error.strerror}): choose another one") from None
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(came) < count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                other = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [str(i) for i in range(1, count) if i not in came]
                raise UserError(
                    f"of {count} processes these did not come to {address} in time: {', '.join(missing)}"
                ) from None
            who = _who(other)
            if who is None:  # a stranger
                other.close()
                continue
            if who[1] != count:
                raise UserError(f"process {who[0]} says that there are {who[1]} processes, process 0 that {count}")
            if who[0] in came:  # started again, or two have one number: the one that came first is sent away
                came[who[0]].close()
            came[who[0]] = other
        for other in came.values():
            with contextlib.suppress(OSError):  # that it is gone again, jax will notice
                other.sendall(_GO)


def _who(other: socket.socket) -> tuple[int, int] | None:
    """Number and count that one who has come says; None if it is not one of ours."""
    other.settimeout(_HELLO)
    with contextlib.suppress(OSError):
        said = re.fullmatch(rb"m1jax ([1-9][0-9]*) ([0-9]+)\n", other.recv(64))
        return (int(said[1]), int(said[2])) if said else None
    return None


def _come(host: str, port: int, hello: bytes, deadline: float) -> None:
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as first:
                first.sendall(hello)
                said = first.recv(64)
        except TimeoutError:
            continue
        except OSError as error:  # not there yet, or not in the name service yet
            why = f" ({error.strerror or error})"
            time.sleep(_RETRY)
            continue
        if said == _GO:
            return
        if not said:
            raise UserError(f"process 0 at {host}:{port} sent this one away: it says why, or two have the same number")
        time.sleep(_RETRY)  # somebody else listens there, for now
    raise UserError(f"process 0 did not answer at {host}:{port} in time{why}")
