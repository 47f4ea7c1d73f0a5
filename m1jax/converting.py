"""Safetensors to a checkpoint that loads fast and sharded: what `python -m m1jax.convert` runs.

Memory stays at a few tensors, whatever the size of the source.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from numpy.typing import NDArray
from tqdm import tqdm

from m1jax import checkpoint
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantization, quantize_on_host
from m1jax.loading import MARKER, check_quantization, open_source
from m1jax.lora.adapter import Adapter, Pair, open_adapter
from m1jax.lora.adapter import digest as adapter_digest
from m1jax.params import ParamSpec
from m1jax.safetensors import Tensor
from m1jax.weights import Piece, Slot, expected
from m1jax.workplace import Workplace, carry, check_paths, check_space, disk_errors, open_workplace

_BATCH = 128 << 20  # bytes that reach the disk together; what is lost when the process is killed
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Job:
    """`parameter path[index] = tensor`, reshaped, and quantised if that is how the parameter is stored.

    With an adapter `pair` is what is added to it.
    """

    path: str
    index: tuple[int, ...]
    tensor: Tensor
    pair: Pair | None = None


def convert(
    src: Path,
    dst: Path,
    dtype: str = "keep",
    overwrite: bool = False,
    quantize: Quantization | None = None,
    adapter: Path | None = None,
) -> None:
    """Converts the safetensors folder `src` to the checkpoint `dst`.

    Args:
      dtype: "keep" stores every tensor's own dtype, "float32" or "bfloat16" casts all but the parameters that are
        always float32 (the router).
      overwrite: replaces a checkpoint at `dst`, at the very end.
      quantize: "int8" or "int4" stores the experts' weights so; they cannot be exported again.
      adapter: folder of a LoRA adapter, which is added to the weights.

    Raises:
      UserError: `src` is not a whole checkpoint, `adapter` none of it, `dst` is taken, or the disk is full. `dst` is
        then as it was.
    """
    if dtype != "keep" and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: choose keep, float32 or bfloat16")
    if (src / MARKER).exists():
        raise UserError(f"{src} is a converted checkpoint already: python -m m1jax.export makes safetensors of it")
    check_quantization(quantize)
    config, tensors, plan = open_source(src)
    check_paths(src, dst, overwrite)
    try:
        table = checkpoint.stored_table(config, quantize)
    except ValueError as error:
        raise UserError(f"{src} cannot be quantised to {quantize}: {error}") from None
    low = None if adapter is None else open_adapter(adapter, config)
    kinds = {path: _stored_dtype(path, spec, plan, tensors, dtype) for path, spec in table.items()}
    jobs = [
        Job(path, piece.index, tensors[piece.name]) for path in checkpoint.stored_table(config) for piece in plan[path]
    ]
    if low is not None:
        jobs = _adapted(jobs, low)
    jobs.sort(key=lambda job: (job.tensor.file, job.tensor.start))
    with disk_errors(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        with open_workplace(dst, _identity(src, tensors, dtype, quantize, low), overwrite) as place:
            done = set[str]().union(*place.done)
            left = [job for job in jobs if job.tensor.name not in done]
            check_space(place.path, _room(left, table, kinds))
            if not place.done:
                checkpoint.create(place.path, {path: (spec, kinds[path]) for path, spec in table.items()})
                place.record([])
            _write(place, jobs, left, checkpoint.open_arrays(place.path, table))
            carry(src, place.path)
            dtypes = _exceptions(expected(config), jobs, kinds) if dtype == "keep" and quantize is None else {}
            marker = {
                "format": checkpoint.FORMAT,
                "dtype": dtype,
                "quantize": quantize,
                "dtypes": dtypes,
                "arrays": sorted(table),
            }
            if low is not None:
                marker["adapter"] = str(low.folder)
            (place.path / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _adapted(jobs: list[Job], adapter: Adapter) -> list[Job]:
    """The jobs with what is added to each. Raises `UserError` for a matrix that is a part of a tensor."""
    pairs = adapter.by_place()
    out = [dataclasses.replace(job, pair=pairs.pop((job.path, job.index), None)) for job in jobs]
    if pairs:
        raise UserError(
            f"{adapter.folder} adapts experts one by one, which transformers' fused layout has together: "
            "convert it without the adapter, export it, and convert that"
        )
    return out


def _stored_dtype(
    path: str, spec: ParamSpec, plan: Mapping[str, list[Piece]], tensors: Mapping[str, Tensor], dtype: str
) -> np.dtype[Any]:
    """The dtype of a stored array: with "keep" the one of its tensors, or float32, which holds all, if they differ."""
    if path not in plan:  # values or scales
        return np.dtype(spec.dtype or dtype)
    if dtype == "keep":
        kinds = {tensors[piece.name].dtype for piece in plan[path]}
        return kinds.pop() if len(kinds) == 1 else _DTYPES["float32"]
    return _DTYPES[spec.dtype or dtype]


def _exceptions(slots: Mapping[str, Slot], jobs: list[Job], kinds: Mapping[str, np.dtype[Any]]) -> dict[str, str]:
    """Official names of the tensors that were stored wider than they are, with their dtypes."""
    sources = {(job.path, job.index): job.tensor.dtype for job in jobs}
    out = {}
    for name, slot in slots.items():
        # A fused tensor holds several official ones: it is found under the beginning of their index.
        found = next(sources[slot.target, slot.index[:n]] for n in range(4) if (slot.target, slot.index[:n]) in sources)
        if found != kinds[slot.target]:
            out[name] = found.name
    return out


def _identity(
    src: Path, tensors: Mapping[str, Tensor], dtype: str, quantize: Quantization | None, adapter: Adapter | None
) -> dict[str, Any]:
    """What an unfinished conversion must agree in to be continued: options, config and the source files as they are."""
    digest = hashlib.sha256((src / "config.json").read_bytes())
    for name in sorted(tensors):
        digest.update(repr((name, tensors[name].dtype.name, tensors[name].shape, tensors[name].start)).encode())
    for file in sorted({tensor.file for tensor in tensors.values()}):
        digest.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    if adapter is not None:
        digest.update(adapter_digest(adapter.folder).encode())
    return {"convert": checkpoint.FORMAT, "dtype": dtype, "quantize": quantize, "source": digest.hexdigest()}


def _room(jobs: list[Job], table: Mapping[str, ParamSpec], kinds: Mapping[str, np.dtype[Any]]) -> int:
    """Bytes that the jobs will take on disk, with 2% for the database around them."""
    size = 0
    for job in jobs:
        for path in _stored(job.path, table):
            size += math.prod(table[path].shape[len(job.index) :]) * kinds[path].itemsize
    return size + size // 50 + (4 << 20)


def _stored(path: str, table: Mapping[str, Any]) -> list[str]:
    """The arrays that hold a parameter: itself, or values and scales."""
    return [path] if path in table else [f"{path}.values", f"{path}.scales"]


def _write(place: Workplace, jobs: list[Job], left: list[Job], stores: dict[str, ts.TensorStore]) -> None:
    """Writes the jobs that are left, a batch after the other: each a transaction, then a line of progress."""
    total, missing = (sum(job.tensor.nbytes for job in some) for some in (jobs, left))
    with tqdm(total=total, initial=total - missing, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        for batch in _batches(left):
            transaction, pending = ts.Transaction(), 0
            for job in batch:
                targets = [stores[path] for path in _stored(job.path, stores)]
                for first, last, arrays in _pieces(job, targets):
                    at = (*job.index, slice(first, last))
                    for store, values in zip(targets, arrays, strict=True):
                        store.with_transaction(transaction)[at].write(values).result()
                        pending += values.nbytes
                    bar.update(job.tensor.nbytes * (last - first) // targets[0].shape[len(job.index)])
                    if pending >= _BATCH:  # a tensor larger than a batch
                        _commit(place, transaction)
                        transaction, pending = ts.Transaction(), 0
            _commit(place, transaction)
            place.record([job.tensor.name for job in batch])


def _commit(place: Workplace, transaction: ts.Transaction) -> None:
    try:
        transaction.commit_async().result()
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"{place.path} cannot be written ({checkpoint.short(error)}): "
            "make room or check the disk, then run again: it continues"
        ) from error


def _batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Consecutive jobs of together about `_BATCH` bytes."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        batch.append(job)
        size += job.tensor.nbytes
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(job: Job, stores: list[ts.TensorStore]) -> Iterator[tuple[int, int, Sequence[NDArray[Any]]]]:
    """Rows first … last - 1 of the tensor as the stores have them, whole chunks of the first store at a time."""
    kind: Quantization | None = None
    if len(stores) == 2:
        kind = "int8" if stores[0].dtype.numpy_dtype == np.int8 else "int4"
    *rest, width = stores[0].shape[len(job.index) :]
    tensor = job.tensor._replace(shape=(*rest, 2 * width if kind == "int4" else width))
    for first, last in checkpoint.windows_of(stores[0], len(job.index)):
        rows = tensor.rows(first, last)
        if job.pair is not None:
            rest = tuple(slice(0, size) for size in tensor.shape[1:])
            rows = rows + job.pair.added(tensor.shape, (slice(first, last), *rest))
        with np.errstate(all="ignore"):
            yield (
                first,
                last,
                [rows.astype(stores[0].dtype.numpy_dtype)] if kind is None else quantize_on_host(rows, kind),
            )
