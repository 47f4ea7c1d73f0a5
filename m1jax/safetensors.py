"""Safetensors folders: a reader that checks everything before it trusts anything, and a writer that streams.

The `safetensors` library reads bfloat16 only into torch or jax, and serialises only what lies in memory as a whole.
Both ends are little more than a JSON header, so they are written out here: tensors are views of a memory map, and a
shard of any size is written tensor by tensor.
"""

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m1jax.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WRITER = "m1jax"

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BOOL": np.dtype(np.bool_),
    **{f"I{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"U{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # the format's own limit
_AGAIN = "download it again"


class Tensor(NamedTuple):
    """Where a tensor lies: `start` is its first byte in `file`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Elements first … last - 1 along the leading axis, a read-only view of the file.

        Every call makes its own mapping: when the view dies, its pages no longer count as this process's memory.
        """
        shape = (last - first, *self.shape[1:])
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        return np.memmap(self.file, self.dtype, "r", self.start + first * stride, shape)

    def view(self) -> NDArray[Any]:
        """The whole tensor as a read-only view of the file."""
        return self.rows(0, self.shape[0]) if self.shape else self._replace(shape=(1,)).rows(0, 1).reshape(())


def listing(names: Iterable[str]) -> str:
    """All names; those that differ only in a number between dots or hyphens as one: ``layers.[0-3,7].w1``."""
    numbers: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<=[.-])(\d+)(?=[.-])", name)
        numbers.setdefault(tuple(parts[::2]), []).append(tuple(parts[1::2]))
    return ", ".join(
        "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, block, fillvalue="")))
        for texts, found in numbers.items()
        for block in _blocks(found)
    )


def _blocks(found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Tuples of numbers as products of sets."""
    if not found[0]:
        return [()]
    tails: dict[str, list[tuple[str, ...]]] = {}
    for first, *tail in sorted(set(found), key=lambda numbers: [int(n) for n in numbers]):
        tails.setdefault(first, []).append(tuple(tail))
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for first, tail in tails.items():
        alike.setdefault(tuple(tail), []).append(first)
    return [(_runs(firsts), *block) for tail, firsts in alike.items() for block in _blocks(list(tail))]


def _runs(numbers: list[str]) -> str:
    """Rising numbers as ``5`` or ``[0-3,7]``."""
    values = {int(n) for n in numbers}
    starts = [n for n in numbers if int(n) - 1 not in values]
    ends = [n for n in numbers if int(n) + 1 not in values]
    runs = ",".join(first if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True))
    return f"[{runs}]" if len(numbers) > 1 else runs


# --- reading -------------------------------------------------------------------------------------------------------


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a folder that holds `model.safetensors`, or an index and its shards.

    Reads headers only. Raises:
      UserError: anything is missing, truncated, corrupt, or contradicts the index; the line names file and tensor.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a folder with a model's safetensors files")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that holds it")
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists() and single.exists():
        raise UserError(f"{folder} holds both {SINGLE_NAME} and {INDEX_NAME}: remove the one that is not the model")
    if index.exists():
        return _read_shards(folder, _read_index(index))
    if single.exists():
        return read_file(single)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    found = f" (only {listing(others)})" if others else ""
    raise UserError(f"{folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there{found}")


def is_ours(folder: Path) -> bool:
    """Whether `write_folder` made the folder."""
    try:
        return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["written_by"] == WRITER
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _read_index(file: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name to shard name."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): {_AGAIN}") from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{file} has no weight_map: {_AGAIN}")
    for name, shard in weights.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{file} says that {name} is in {shard!r}, which is not a file name: {_AGAIN}")
    return weights


def _read_shards(folder: Path, weights: Mapping[str, str]) -> dict[str, Tensor]:
    shards = sorted(set(weights.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(f"{folder} is incomplete: {INDEX_NAME} names {listing(missing)}, not there: download the rest")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in read_file(folder / shard).items():
            if name in tensors:
                raise UserError(
                    f"{name} is in two shards, {tensors[name].file.name} and {shard}, of {folder}: {_AGAIN}"
                )
            tensors[name] = tensor
    absent = [name for name in weights if name not in tensors or tensors[name].file.name != weights[name]]
    if absent:
        where = listing(f"{name} (in {weights[name]})" for name in absent)
        raise UserError(f"{folder}: {INDEX_NAME} names tensors that are not in their shard: {where}: {_AGAIN}")
    unlisted = [f"{name} (in {tensor.file.name})" for name, tensor in tensors.items() if name not in weights]
    if unlisted:
        raise UserError(f"{folder}: shards hold tensors that {INDEX_NAME} does not name: {listing(unlisted)}: {_AGAIN}")
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, its header checked against the file's size. Raises `UserError`."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise UserError(f"{file} is truncated: {size} bytes: {_AGAIN}")
            (length,) = struct.unpack("<Q", start)
            if length > _MAX_HEADER:
                raise UserError(f"{file} is no safetensors file: its header would have {length} bytes: {_AGAIN}")
            if 8 + length > size:
                raise UserError(f"{file} is truncated: header of {length} bytes in a file of {size}: {_AGAIN}")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return _read_entries(file, _parse_header(file, text), 8 + length, size)


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            names = [name for name, _ in pairs]
            raise UserError(f"{file} names {next(n for n in names if names.count(n) > 1)} twice: {_AGAIN}")
        return out

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is corrupt: its header is not JSON ({error}): {_AGAIN}") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} is corrupt: its header is not a JSON object: {_AGAIN}")
    header.pop("__metadata__", None)
    return header


def _read_entries(file: Path, header: Mapping[str, Any], base: int, size: int) -> dict[str, Tensor]:
    """Checks that the tensors fill the file from `base` to `size` without gap or overlap."""
    spans = sorted((*_read_span(file, name, entry), name) for name, entry in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a gap before it"
            raise UserError(f"{file} is corrupt: {name} starts at byte {first}, not {end}, and {what}: {_AGAIN}")
        end = last
    if base + end != size:
        what = "truncated" if base + end > size else "corrupt"
        raise UserError(f"{file} is {what}: its tensors need {base + end} bytes, the file has {size}: {_AGAIN}")
    return {
        name: Tensor(name, DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]), file, base + first)
        for first, _, name in spans
    }


def _read_span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, once its dtype, shape and offsets agree."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{file} is corrupt: {name} lacks dtype, shape or data_offsets: {_AGAIN}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(
            f"{file}: {name} has unknown dtype {kind!r}: convert from a checkpoint in one of {', '.join(DTYPES)}"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{file} is corrupt: {name} has shape {shape} and data_offsets {offsets}: {_AGAIN}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(
            f"{file} is corrupt: {name} ({kind} {shape}) has {offsets[1] - offsets[0]} bytes, "
            f"not {math.prod(shape) * DTYPES[kind].itemsize}: {_AGAIN}"
        )
    return offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


# --- writing -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to be written; `read` gives its values, in pieces along the leading axis, when their turn comes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(entries: Sequence[Entry]) -> bytes:
    """Length and header of a safetensors file, padded so that the data starts at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(file: Path, entries: Sequence[Entry], progress: Callable[[int], object] = lambda _: None) -> None:
    """Writes one safetensors file, one piece of a tensor in memory at a time.

    The file appears under its name when it is whole and on disk. `progress` is called with the bytes just written.
    """
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(header_bytes(entries))
        for entry in entries:
            for piece in entry.read():
                data = np.ascontiguousarray(piece, entry.dtype).reshape(-1).view(np.uint8)
                stream.write(data.data)
                progress(data.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def split_shards(entries: Sequence[Entry], max_shard: int) -> list[list[Entry]]:
    """Splits tensors, in order, into shards of at most `max_shard` bytes; a larger tensor is a shard of its own."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.nbytes > max_shard:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.nbytes
    return shards


def write_folder(
    folder: Path, entries: Sequence[Entry], max_shard: int, progress: Callable[[int], object] = lambda _: None
) -> None:
    """Writes shards and their index. Shards that are there already, whole, are kept: see `write_file`."""
    shards = split_shards(entries, max_shard)
    weights: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if file.exists():
            progress(sum(entry.nbytes for entry in shard))
        else:
            write_file(file, shard, progress)
        weights |= dict.fromkeys((entry.name for entry in shard), file.name)
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total, "written_by": WRITER}, "weight_map": weights}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
