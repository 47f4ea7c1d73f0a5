"""The converted checkpoint: a folder with config and tokenizer files, `m1jax.json`, and an Orbax checkpoint `weights`.

    from orbax.checkpoint import v1 as ocp
    tree = ocp.load("CKPT/weights")                      # or with abstract arrays: other dtypes, shards of a mesh

Orbax saves a tree whose arrays are in memory; these are not. So it is given the same tree with arrays of one element,
and then each array is made anew through tensorstore in the place and the format that Orbax chose, at its full size,
to be filled piece by piece. All that depends on Orbax's version is thus written by Orbax.
"""

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantization
from m1jax.loading import MARKER, Source, aligned_empty, windows
from m1jax.params import ParamSpec, nest, param_table
from m1jax.safetensors import listing

WEIGHTS = "weights"
FORMAT = 1
_KEYS = {"format", "dtype", "quantize", "dtypes", "arrays"}
_MAY = {"adapter"}  # the folder of one that was added to the weights

_CHUNK = 16 << 20  # bytes; small enough that a shard of a mesh reads little more than its own
# The axes along which tensors are usually sharded are cut before the others.
_CUT_FIRST = ("vocab", "heads", "kv_heads", "expert_width", "shared_width")
_WHOLE = ("layer", "experts", "gate_up")  # axes of which a chunk holds one index: no two source tensors share a chunk


def read_marker(folder: Path) -> dict[str, Any]:
    """What `m1jax.json` says. Raises `UserError` if it is not there or not this version's."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a folder made by python -m m1jax.convert")
    if not (folder / MARKER).exists():
        raise UserError(
            f"{folder} is not a converted checkpoint, it has no {MARKER}: run python -m m1jax.convert first"
        )
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / MARKER} cannot be read ({error}): convert the model again") from None
    if not isinstance(marker, dict) or marker.keys() - _MAY != _KEYS or marker["format"] != FORMAT:
        raise UserError(f"{folder} was converted by another version of m1jax: convert the model again")
    return marker


def chunk_shape(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """The shape of the stored chunks of a parameter: one layer, one expert, and of that at most `_CHUNK` bytes."""
    chunk = [1 if axis in _WHOLE else size for axis, size in zip(spec.axes, spec.shape, strict=True)]
    order = sorted(range(len(chunk)), key=lambda i: (spec.axes[i] not in _CUT_FIRST, -chunk[i]))
    for i in order:
        room = max(1, _CHUNK * chunk[i] // (math.prod(chunk) * itemsize))
        chunk[i] = next(n for n in range(min(room, chunk[i]), 0, -1) if chunk[i] % n == 0)
    return tuple(chunk)


def create(folder: Path, arrays: Mapping[str, tuple[ParamSpec, np.dtype[Any]]]) -> None:
    """Writes the Orbax checkpoint `folder/weights` with arrays of zeros; nothing but metadata is on disk."""
    from orbax.checkpoint import v1 as ocp  # takes half a second, which loading need not wait for

    for remains in folder.glob(f"{WEIGHTS}*"):
        shutil.rmtree(remains)
    tree = nest({path: np.zeros((1,) * len(spec.shape), kind) for path, (spec, kind) in arrays.items()})
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # Orbax logs a traceback from each of its threads before it raises
    try:
        ocp.save(str((folder / WEIGHTS).resolve()), tree)
    except Exception as error:
        raise UserError(
            f"{folder / WEIGHTS} cannot be written ({short(error)}): make room or check the disk"
        ) from error
    finally:
        log.setLevel(level)
    for path, (spec, kind) in arrays.items():
        layout = ts.open(_tensorstore_spec(folder, path)).result().spec().to_json()
        layout["metadata"]["shape"] = list(spec.shape)
        chunk = list(chunk_shape(spec, kind.itemsize))
        layout["metadata"]["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        # Weights hardly compress; a checksum costs little and finds damage.
        layout["metadata"]["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        layout.pop("transform")
        ts.open(layout, create=True, delete_existing=True).result()


def open_arrays(folder: Path, table: Mapping[str, ParamSpec]) -> dict[str, ts.TensorStore]:
    """The stored arrays of parameters, to be read or written; they share one database, so also transactions.

    Raises:
      UserError: an array is missing or damaged, or has another shape than in the table.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})  # without it every chunk reads the index anew
    try:
        stores = {path: ts.open(_tensorstore_spec(folder, path), context=context).result() for path in table}
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged ({short(error)}): convert the model again") from error
    shapes = {path: (list(store.shape), list(table[path].shape)) for path, store in stores.items()}
    wrong = [f"{path} is {found}, not {wanted}" for path, (found, wanted) in shapes.items() if found != wanted]
    if wrong:
        raise UserError(f"{folder}: config.json contradicts the weights: {listing(wrong)}: convert again")
    return stores


def open_checkpoint(folder: Path) -> tuple[M1Config, dict[str, Any], dict[str, ts.TensorStore]]:
    """Config, marker and stored arrays of a converted checkpoint. Raises `UserError`."""
    marker = read_marker(folder)
    config = M1Config.from_file(folder)
    table = stored_table(config, marker["quantize"])
    if sorted(table) != marker["arrays"]:
        differing = sorted(table.keys() ^ set(marker["arrays"]))
        raise UserError(f"{folder}: config.json contradicts the weights in {listing(differing)}: convert again")
    return config, marker, open_arrays(folder, table)


def stored_table(config: M1Config, quantize: Quantization | None = None) -> dict[str, ParamSpec]:
    """The parameters that are stored: not the empty ones of an absent kind of layer, which Orbax refuses."""
    return {path: spec for path, spec in param_table(config, quantize).items() if 0 not in spec.shape}


def windows_of(store: ts.TensorStore, axis: int, rows: range | None = None) -> Iterator[tuple[int, int]]:
    """Stretches of rows along `axis` that hold whole chunks, as long as there is one index of each axis before it."""
    chunk = store.chunk_layout.read_chunk.shape
    assert chunk is not None  # zarr has chunks
    size = math.prod(store.shape[axis + 1 :]) * store.dtype.numpy_dtype.itemsize
    return windows(rows or range(store.shape[axis]), size, chunk[axis] or 1)


def short(error: Exception) -> str:
    """The beginning of an error's text, on one line, or of a long one what matters."""
    text = " ".join(str(error).split())
    return "No space left on device" if "No space left on device" in text else text[:200]


def _tensorstore_spec(folder: Path, path: str) -> dict[str, Any]:
    """Where Orbax put an array: in the one database of its checkpoint, under the keys joined by dots."""
    manifests = list((folder / WEIGHTS).glob("*/manifest.ocdbt"))
    if len(manifests) != 1:
        raise UserError(f"{folder / WEIGHTS} is damaged: it holds {len(manifests)} databases, not 1: convert again")
    base = f"file://{manifests[0].parent.resolve()}/"
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": path + "/"}}


def open_parameters(folder: Path) -> Source:
    """A converted checkpoint, to be read. Raises `UserError`.

    `ocp.load` reads the same arrays but holds a parameter twice while it loads it, and M1's largest is half of M1.
    """
    config, marker, stores = open_checkpoint(folder)

    def read(name: str, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            return _read_block(stores[name], spec, block, dtype)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: {name} is damaged ({short(error)}): convert the model again") from error

    return Source(config, read, marker["quantize"], stored=marker["quantize"] is not None)


def _read_block(store: ts.TensorStore, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`parameter[block]` in an aligned buffer, some chunks in memory beside it at a time."""
    bounds = [range(*part.indices(size)) for part, size in zip(block, spec.shape, strict=True)]
    out = aligned_empty(tuple(len(part) for part in bounds), dtype)
    depth = sum(axis in _WHOLE for axis in spec.axes)  # these axes come first
    start = [part.start for part in bounds]
    rest = tuple(slice(part.start, part.stop) for part in bounds[depth + 1 :])

    def copy(job: tuple[tuple[int, ...], tuple[int, int]]) -> None:
        index, (first, last) = job
        here = tuple(i - origin for i, origin in zip(index, start, strict=False))
        target = ts.array(out[(*here, slice(first - start[depth], last - start[depth]))])
        target.write(ts.cast(store, target.dtype)[(*index, slice(first, last), *rest)]).result()

    rows = list(windows_of(store, depth, bounds[depth]))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(copy, itertools.product(itertools.product(*bounds[:depth]), rows)):
            pass
    return out
