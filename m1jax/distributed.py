"""One program on several machines: the flags, the start, and the end when a process is lost.

Every process runs the same command. jax's coordination service, on process 0, finds the processes, watches their
heartbeats and ends all of them when one is missing, naming it. Only process 0 prints.
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

from m1jax import errors
from m1jax.errors import UserError
from m1jax.rendezvous import meet

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEARTBEAT = 10  # seconds without one until a process counts as lost
CONNECT = 600  # seconds until all processes must have called: one machine may have an image to fetch first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs on several machines."""
    group = parser.add_argument_group("several machines (every process runs the same command)")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0; auto lets jax find everything under SLURM, Kubernetes, Open MPI or on TPU pods",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def check(args: argparse.Namespace) -> None:
    """Raises `UserError` for flags that contradict each other; needs no jax."""
    count, index = args.num_processes, args.process_id
    if args.coordinator in (None, "auto"):
        if count is not None or index is not None:
            raise UserError("--num-processes and --process-id go with --coordinator HOST:PORT")
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", args.coordinator):
        raise UserError(f"--coordinator {args.coordinator!r}: expected HOST:PORT or auto")
    if not 1 <= int(args.coordinator.rpartition(":")[2]) <= 65535:
        raise UserError(f"--coordinator {args.coordinator}: a port is a number from 1 to 65535")
    if count is None or index is None:
        raise UserError("--coordinator HOST:PORT needs --num-processes and --process-id")
    if not 0 <= index < count:
        raise UserError(f"--process-id {index} must be 0 … {count - 1}, as --num-processes is {count}")


def start(args: argparse.Namespace) -> int:
    """Joins the other processes, if there are any; which process this is. To be called before jax is used.

    Raises:
      UserError: no cluster is found, the others do not answer, or the coordinator's port is taken.
    """
    if args.coordinator is None:
        return 0
    address = None if args.coordinator == "auto" else args.coordinator
    if address is not None:
        meet(address, args.num_processes, args.process_id, CONNECT)
    import jax

    try:
        jax.distributed.initialize(
            address,
            args.num_processes,
            args.process_id,
            initialization_timeout=CONNECT,
            heartbeat_timeout_seconds=HEARTBEAT,
            # SLURM and the like would overrule what is given, and leave this process one device.
            cluster_detection_method=None if address is None else "deactivate",
        )
    except (RuntimeError, ValueError) as error:
        found = "no cluster was found" if address is None else f"the processes did not meet at {address}"
        raise UserError(f"{found} ({' '.join(str(error).split())[:200]})") from None
    index = jax.process_index()
    errors.several_processes(index)
    # Gloo writes to stdout from C++: that goes to stderr, or nowhere, and this program's own text where it belongs.
    sys.stdout.flush()
    out = os.open(os.devnull, os.O_WRONLY) if index else os.dup(1)
    os.dup2(out if index else 2, 1)
    sys.stdout = os.fdopen(out, "w", encoding=sys.stdout.encoding, errors="replace")
    if index:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    return index


def is_first(args: argparse.Namespace) -> bool:
    """Whether this is process 0, for commands that one process does alone: the others have nothing to do."""
    if args.coordinator is None or args.process_id is not None:
        return not args.process_id
    index = start(args)
    import jax

    jax.distributed.shutdown()  # nobody waits for anybody
    return index == 0


def agreed_seed(seed: int | None) -> int | None:
    """The seed, or where none is given one that process 0 draws for all."""
    if seed is not None:
        return seed
    import numpy as np

    return int(of_first(np.asarray([secrets.randbelow(1 << 31)], np.int32))[0])


def of_first(rows: "NDArray[Any]") -> "NDArray[Any]":
    """Process 0's array `[n, …]`, on every process; theirs count for nothing but dtype and the other sizes."""
    if errors.alone():
        return rows
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    n = int(multihost_utils.broadcast_one_to_all(np.int32(len(rows))))
    if jax.process_index():
        rows = np.zeros((n, *rows.shape[1:]), rows.dtype)
    return np.asarray(multihost_utils.broadcast_one_to_all(rows)) if n else rows


def gathered(value: Any) -> list[Any]:
    """The values of all processes, JSON, in every process."""
    import jax

    if jax.process_count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def check_same(name: str, value: object) -> None:
    """Raises `UserError`, in every process, if they do not all have the same value, going by its `repr`."""
    if errors.alone():  # the repr of many lines takes its time
        return
    own, all_ = _digests(repr(value))
    for i, other in enumerate(all_):
        if other != own:
            raise UserError(f"process {i} has another {name} than this one: give all of them the same")


def neighbours() -> int:
    """How many of the processes are on this machine, this one included."""
    own, all_ = _digests(socket.gethostname())
    return all_.count(own)


def _digests(value: str) -> tuple[bytes, list[bytes]]:
    """The digests of this process's value and of all processes' values."""
    own = hashlib.sha256(value.encode()).digest()
    if errors.alone():
        return own, [own]
    import numpy as np
    from jax.experimental import multihost_utils

    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(own, np.int32)))
    return own, [row.tobytes() for row in rows]


def wait(name: str) -> None:
    """Returns when all processes have called it with this name; at once if there is only one."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
