"""`load`: a model from an official or transformers safetensors folder, or from a converted checkpoint.

Every parameter is one buffer, filled straight from the mapped files and cast on the way, which JAX on CPU then takes
over without a copy: memory holds the data once.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from numpy.typing import NDArray

from m1jax.config import M1Config, check_model_folder
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantization, quantize_on_host, stored_shapes
from m1jax.model import M1, build
from m1jax.params import QUANTIZED, ParamSpec, param_table
from m1jax.safetensors import Tensor, read_folder
from m1jax.sharding.mesh import parsed_mesh
from m1jax.sharding.placing import place
from m1jax.sharding.rules import check, param_sharding
from m1jax.sharding.sizes import require_room
from m1jax.weights import Piece, plan

MARKER = "m1jax.json"  # the last file that a conversion writes
ADAPTER_MARKER = "m1jax_adapter.json"  # that of an adapter that m1jax has trained
PROGRESS = "m1jax.progress.jsonl"  # lies in unfinished conversions and exports

_ALIGNMENT = 64  # bytes; XLA:CPU takes over a host buffer that starts on this boundary
# (path of a parameter, its spec, one slice per axis, dtype) -> that block
Reader = Callable[[str, ParamSpec, tuple[slice, ...], np.dtype[Any]], NDArray[Any]]

_WINDOW = 32 << 20  # bytes of a source tensor mapped at once


class Source(NamedTuple):
    """An opened model folder: its config, how to read any block of any parameter, how the experts are quantised.

    `stored` is whether they are quantised in the folder, not while they are read.
    """

    config: M1Config
    read: Reader
    quantize: Quantization | None = None
    stored: bool = False


def load(
    path: str | Path,
    dtype: DTypeLike = "float32",
    quantize: Quantization | None = None,
    *,
    mesh: Mesh | str | None = None,
    adapter: str | Path | None = None,
) -> M1:
    """The model in `path` with parameters and computation in `dtype` ("float32" or "bfloat16").

    Router and shared-expert coefficient stay float32. The folder holds config.json and either safetensors in the
    official or in transformers' layout, or the result of ``python -m m1jax.convert``.

    Every process reads what its own devices hold of a mesh, no more.

    Args:
      path: the folder.
      dtype: float32 or bfloat16, by name or as a dtype.
      quantize: "int8" or "int4" holds the experts' weights as `m1jax.kernels.experts.Quantized`, rounded while they
        are read; a checkpoint that was converted so is read as it is.
      mesh: where the model lies: a mesh, its sizes ("data=1,expert=8,tensor=1"), "auto" for one that suits the model
        and the devices present, or None, the first device.
      adapter: folder of a LoRA adapter, by `m1jax.train` or PEFT, whose products are added to the weights.

    Raises:
      UserError: the folder is missing, incomplete or corrupt, its config contradicts its weights, no such `dtype` or
        `quantize`, the checkpoint is quantised otherwise, the mesh does not fit the model or the devices, or the
        devices have no room for the model.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not supported: choose float32 or bfloat16")
    dtype, path = name, Path(path).expanduser()
    config, read, quantize, stored = open_parameters(path, quantize, adapter)
    if mesh is None and jax.process_count() > 1:
        raise UserError(
            f"mesh is missing: {jax.process_count()} processes share a model by one, such as expert=8 or auto"
        )
    if isinstance(mesh, str):
        mesh = parsed_mesh(mesh, config, quantize=quantize)
    if mesh is not None:
        check(config, mesh, quantize)
    require_room(str(path), config, mesh, dtype, quantize, stored)

    def leaf(name: str, spec: ParamSpec) -> jax.Array:
        kind = np.dtype(jnp.dtype(spec.dtype or dtype))
        where = SingleDeviceSharding(jax.devices()[0]) if mesh is None else param_sharding(mesh, name, spec)
        if 0 in spec.shape:
            return jnp.zeros(spec.shape, kind, device=where)
        return place(lambda block: read(name, spec, block, kind), spec.shape, kind, where)

    return build(config, leaf, quantize)


def open_parameters(path: Path, quantize: Quantization | None = None, adapter: str | Path | None = None) -> Source:
    """Opens a folder that `load` takes; `quantize` and `adapter` as there. Raises `UserError`."""
    check_quantization(quantize)
    source = _open(path)
    if adapter is not None:
        from m1jax.lora.adapter import adapted, open_adapter  # it builds on this module

        source = adapted(source, open_adapter(Path(adapter).expanduser(), source.config))
    if source.quantize is not None and quantize not in (None, source.quantize):
        raise UserError(f"{path} is quantised to {source.quantize}: {quantize} needs the model it was converted from")
    if quantize is None or source.quantize is not None:
        return source
    try:
        param_table(source.config, quantize)
    except ValueError as error:
        raise UserError(f"{path} cannot be quantised to {quantize}: {error}") from None
    return Source(source.config, _quantizing(source, quantize), quantize)


def check_quantization(quantize: str | None) -> None:
    """Raises `UserError` unless `quantize` is None, "int8" or "int4"."""
    if quantize not in (None, "int8", "int4"):
        raise UserError(f"quantize {quantize!r} is not supported: choose int8 or int4")


def _open(path: Path) -> Source:
    if (path / MARKER).exists():
        from m1jax import checkpoint  # it builds on this module

        return checkpoint.open_parameters(path)
    config, tensors, pieces = open_source(path)

    def read(name: str, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        sources = [(piece.index, tensors[piece.name]) for piece in pieces[name]]
        return read_block(sources, spec.shape, block, dtype)

    return Source(config, read)


def _quantizing(source: Source, kind: Quantization) -> Reader:
    """Reads values and scales of experts that are stored as floats: matrix by matrix, in whole in-channels.

    A matrix is read once, for its values; its scales are small and kept until they are asked for.
    """
    table = param_table(source.config)

    @functools.cache
    def kept(path: str, index: tuple[int, ...]) -> NDArray[Any]:
        """The scales of a matrix as far as they are known; the others are NaN."""
        return np.full(stored_shapes(kind, table[path].shape)[1][len(index) :], np.nan, np.float32)

    def matrix(path: str, index: tuple[int, ...], rows: range) -> NDArray[Any]:
        """The values of these rows; notes their scales."""
        spec = table[path]
        block = (*(slice(i, i + 1) for i in index), slice(rows.start, rows.stop), slice(0, spec.shape[-1]))
        floats = source.read(path, spec, block, np.dtype(np.float32)).reshape(len(rows), -1)
        values, kept(path, index)[rows.start : rows.stop] = quantize_on_host(floats, kind)
        return values

    @functools.lru_cache(maxsize=1)  # devices that share the in-channels of a block ask for it one after another
    def values_of(path: str, bounds: tuple[range, ...]) -> NDArray[Any]:
        *outer, rows = bounds
        shape = stored_shapes(kind, (*map(len, bounds), table[path].shape[-1]))[0]
        out = aligned_empty(shape, np.dtype(np.int8 if kind == "int8" else np.uint8))

        def one(index: tuple[int, ...]) -> None:
            out[_within(index, outer)] = matrix(path, index, rows)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(one, itertools.product(*outer)):
                pass
        return out

    def scales_of(path: str, bounds: tuple[range, ...]) -> NDArray[Any]:
        *outer, rows = bounds
        shape = stored_shapes(kind, (*map(len, bounds), table[path].shape[-1]))[1]
        out = aligned_empty(shape, np.dtype(np.float32))
        for index in itertools.product(*outer):
            known = kept(path, index)[rows.start : rows.stop]
            if np.isnan(known).any():
                matrix(path, index, rows)
            out[_within(index, outer)] = known
        return out

    def read(name: str, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        path, _, part = name.rpartition(".")
        if part not in ("values", "scales") or path not in QUANTIZED:
            return source.read(name, spec, block, dtype)
        depth = len(table[path].shape) - 1  # axes before the in-channels
        bounds = tuple(range(*b.indices(size)) for b, size in zip(block[:depth], spec.shape, strict=False))
        return (values_of if part == "values" else scales_of)(path, bounds)[(..., *block[depth:])]

    return read


def _within(index: tuple[int, ...], bounds: Sequence[range]) -> tuple[int, ...]:
    return tuple(i - part.start for i, part in zip(index, bounds, strict=True))


def open_source(path: Path) -> tuple[M1Config, dict[str, Tensor], dict[str, list[Piece]]]:
    """Config, tensors and plan of a safetensors folder; reads headers only. Raises `UserError`."""
    if (path / PROGRESS).exists():
        raise UserError(f"{path} is unfinished: run the command that was writing it again")
    if path.is_dir() and not (path / "config.json").exists():
        check_model_folder(path)
        raise UserError(f"{path} is not a model: it has no config.json")
    config = M1Config.from_file(path)
    tensors = read_folder(path)
    try:
        return config, tensors, plan(config, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_block(
    sources: Sequence[tuple[tuple[int, ...], Tensor]],
    shape: tuple[int, ...],
    block: tuple[slice, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """`parameter[block]` of a parameter of the given shape, in an aligned buffer.

    Args:
      sources: tensors with the leading index that each fills.
      block: one slice per axis, as `jax.make_array_from_callback` passes them for a shard.
    """
    bounds = [range(*part.indices(size)) for part, size in zip(block, shape, strict=True)]
    out = aligned_empty(tuple(len(part) for part in bounds), dtype)
    jobs = []
    for index, tensor in sources:
        inside = [i - part.start for i, part in zip(index, bounds, strict=False) if i in part]
        if len(inside) == len(index):
            # A source tensor is the parameter's trailing axes, flattened in pairs: the same bytes.
            jobs.append((out[tuple(inside)], tensor._replace(shape=shape[len(index) :]), bounds[len(index) :]))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda job: _copy(*job), jobs):
            pass
    return out


def _copy(out: NDArray[Any], tensor: Tensor, bounds: Sequence[range]) -> None:
    """Casts `tensor[bounds]` into `out`, mapping one window of the file at a time."""
    rest = tuple(slice(part.start, part.stop) for part in bounds[1:])
    for first, last in windows(bounds[0], tensor.nbytes // tensor.shape[0]):
        with np.errstate(all="ignore"):  # a NaN among the weights is reported where it matters, in the logits
            out[first - bounds[0].start : last - bounds[0].start] = tensor.rows(first, last)[(slice(None), *rest)]


def windows(rows: range, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Splits rows into stretches (first, last + 1) of about 32 MB, each but the last a multiple of so many rows."""
    step = max(1, _WINDOW // max(1, row_bytes) // multiple) * multiple
    for first in range(rows.start, rows.stop, step):
        yield first, min(first + step, rows.stop)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Like `np.empty`, starting where JAX on CPU needs no copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
