"""A folder that is made beside its final place: there as a whole or not at all, one writer, resumable, nothing lost.

`DST.partial` holds the work: a lock, a progress file whose first line says what is being made, then a line for each
step done. When all is done it is renamed to DST.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from m1jax.errors import UserError
from m1jax.loading import ADAPTER_MARKER, MARKER, PROGRESS
from m1jax.safetensors import INDEX_NAME, is_ours

LOCK = "m1jax.lock"

# What goes along with the weights, both ways: config, tokenizer, chat template, and whatever the authors put there.
_CARRIED = (".json", ".jinja", ".model", ".txt", ".py", ".md")
_LEFT = (MARKER, PROGRESS, INDEX_NAME, "pytorch_model.bin.index.json")


@dataclasses.dataclass
class Workplace:
    """An open `DST.partial`: `path` to write in, `done` with the steps of this and earlier runs."""

    path: Path
    done: list[Any]
    progress: TextIO

    def record(self, step: Any) -> None:
        """Notes that a step, any JSON value, is done and on disk."""
        self.done.append(step)
        self.progress.write(json.dumps(step) + "\n")
        self.progress.flush()
        os.fsync(self.progress.fileno())


def check_paths(src: Path, dst: Path, overwrite: bool) -> None:
    """Raises `UserError` if `dst` must not be written: as `check_folder` says, or it has to do with `src`."""
    _check_name(dst)
    one, other = src.resolve(), dst.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(f"{dst} and {src} must be separate folders")
    check_folder(dst, overwrite)


def check_folder(dst: Path, overwrite: bool, remedy: str = "choose another name or give --overwrite") -> None:
    """Raises `UserError` if `dst` cannot be made or replaced: what m1jax has not made is nobody's to replace."""
    _check_name(dst)
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise UserError(f"{dst} exists and is not a folder: choose another name")
    if os.path.ismount(dst):
        raise UserError(f"{dst} is a mount point, which cannot be replaced: give a new folder in it")
    if not dst.exists() or not any(dst.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{dst} exists and is not empty: {remedy}")
    if not any((dst / name).exists() for name in (MARKER, ADAPTER_MARKER)) and not is_ours(dst):
        raise UserError(f"{dst} was not made by m1jax, which therefore does not replace it: choose another name")
    old = _replaced(dst)
    if os.path.lexists(old) and not (old / LOCK).exists():
        raise UserError(f"{old} is in the way: move it")


def _check_name(dst: Path) -> None:
    if dst.name in ("", ".."):
        raise UserError(f"{dst} cannot be replaced: give a new folder's name")


def check_space(folder: Path, needed: int) -> None:
    """Raises `UserError` if the disk of `folder` has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB are needed: make room")


@contextmanager
def open_workplace(dst: Path, what: dict[str, Any], overwrite: bool) -> Iterator[Workplace]:
    """Opens or continues `DST.partial`; at the end of the block it becomes DST. Not at an exception.

    Args:
      what: the identity of the work; that of an earlier run must be the same for it to be continued.
      overwrite: replaces an earlier run for something else, and DST.
    """
    partial = dst.with_name(dst.name + ".partial")
    if partial.exists() and not (partial / LOCK).exists() and any(partial.iterdir()):
        raise UserError(f"{partial} is in the way and not an unfinished run's: move it")
    partial.mkdir(parents=True, exist_ok=True)
    with alone(partial, partial / LOCK):
        steps = _resume(partial, what, overwrite)
        with (partial / PROGRESS).open("a", encoding="utf-8") as stream:
            place = Workplace(partial, steps[1:], stream)
            if not steps:
                place.record(what)
                place.done.clear()
            try:
                yield place
            except BaseException:
                if not place.done and {file.name for file in partial.iterdir()} <= {LOCK, PROGRESS}:
                    shutil.rmtree(partial)
                raise
        _finish(partial, dst, overwrite)


@contextmanager
def alone(folder: Path, lock: Path) -> Iterator[None]:
    """Holds a lock while this process writes in a folder. Raises `UserError` if another one does."""
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process: wait for it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # file systems that have no locks
                raise
        yield


def _resume(partial: Path, what: dict[str, Any], overwrite: bool) -> list[Any]:
    """Identity and finished steps of an earlier run; without one the folder is emptied."""
    file = partial / PROGRESS
    steps = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:  # the line that was being written when the process died
            break
    if steps and steps[0] == what:
        # Without a torn last line, which would swallow the next one.
        _replace(file, "".join(json.dumps(step) + "\n" for step in steps))
        return steps
    if steps and not overwrite:
        raise UserError(
            f"{partial} holds an unfinished run for another source or option: delete it or give --overwrite"
        )
    for item in partial.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != LOCK:
            item.unlink()
    return []


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _finish(partial: Path, dst: Path, overwrite: bool) -> None:
    """Puts the finished folder in its place; what was there goes last."""
    old = _replaced(dst)
    if (old / LOCK).exists():
        shutil.rmtree(old)
    replaces = dst.exists() and any(dst.iterdir())
    if replaces:
        if not overwrite:
            raise UserError(f"{dst} appeared in the meantime: move it and run again")
        (dst / LOCK).touch()  # whoever finds it under its new name knows that it may go
        os.rename(dst, old)
    (partial / PROGRESS).unlink()
    os.rename(partial, dst)
    (dst / LOCK).unlink()
    if replaces:
        shutil.rmtree(old)


def _replaced(dst: Path) -> Path:
    """Where a folder goes that is being replaced."""
    return dst.with_name(dst.name + ".replaced")


def carry(src: Path, dst: Path) -> None:
    """Copies config, tokenizer and the other small files of a model."""
    for file in sorted(src.iterdir()):
        named = file.suffix in _CARRIED or file.name.startswith(("LICENSE", "NOTICE"))
        if file.is_file() and named and file.name not in _LEFT:
            shutil.copyfile(file, dst / file.name)


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turns failures of the file system into one line that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room, then run again: it continues" if full else "check the path and try again"
        raise UserError(f"{error.filename or place}: {error.strerror or error}: {remedy}") from error
