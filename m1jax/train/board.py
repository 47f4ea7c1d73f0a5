"""A run's figures for TensorBoard, each step's in the file when the step is reported.

tensorboardX's own writer leaves that to a thread, which a full disk ends, and then whoever waits for it waits for good.
The messages and their checksums are tensorboardX's, the records around them TensorFlow's (its TFRecord format).
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1jax.errors import UserError

_VERSION = "brain.Event:2"


class Board:
    """An events file of its own in `folder`; what others there hold of steps from `first` on, if not 0, is void.

    Raises:
      UserError: tensorboardX is not installed.
      OSError: the file cannot be made; also of `add`, if it cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import masked_crc32c
        except ImportError:
            raise UserError(
                "log.tensorboard needs tensorboardX: pip install 'm1jax[train]', or set log.tensorboard = false"
            ) from None
        events: Any = event_pb2  # classes that are made when it is imported
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._checksum = masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = self._path.open("xb", buffering=0)
        self._write(file_version=_VERSION)
        if first:
            self._write(step=first + 1, session_log=events.SessionLog(status=events.SessionLog.START))

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Writes figures of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        parts = (length, self._sum(length), event, self._sum(event))
        if self._file.write(b"".join(parts)) != sum(map(len, parts)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def _sum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._checksum(data))
