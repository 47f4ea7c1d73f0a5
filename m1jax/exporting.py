"""A converted checkpoint back into safetensors in the official layout: what `python -m m1jax.export` runs.

Memory stays at a few tensors.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray
from tqdm import tqdm

from m1jax import checkpoint
from m1jax.errors import UserError
from m1jax.loading import MARKER
from m1jax.safetensors import DTYPES, Entry, write_folder
from m1jax.weights import Slot, expected
from m1jax.workplace import carry, check_paths, check_space, disk_errors, open_workplace

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


def export(src: Path, dst: Path, max_shard: int = 5_000_000_000, overwrite: bool = False) -> None:
    """Writes the converted checkpoint `src` as a folder of safetensors, shards of at most `max_shard` bytes and index.

    Raises:
      UserError: `src` is not a converted checkpoint, quantised or damaged, `dst` is taken, or the disk is full.
        `dst` is then as it was.
    """
    config, marker, stores = checkpoint.open_checkpoint(src)
    if marker["quantize"]:
        raise UserError(f"{src} is quantised to {marker['quantize']}: the official layout has no such weights")
    check_paths(src, dst, overwrite)
    entries = [
        _entry(name, slot, stores[slot.target], marker["dtypes"].get(name)) for name, slot in expected(config).items()
    ]
    total = sum(entry.nbytes for entry in entries)
    with disk_errors(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        with open_workplace(dst, _identity(src, max_shard), overwrite) as place:
            for torn in place.path.glob("*.part"):  # written again from its start
                torn.unlink()
            written = sum(file.stat().st_size for file in place.path.glob("*.safetensors"))
            check_space(place.path, total - written + (4 << 20))
            with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
                write_folder(place.path, entries, max_shard, bar.update)
            carry(src, place.path)


def _identity(src: Path, max_shard: int) -> dict[str, Any]:
    """What an unfinished export must agree in to be continued."""
    digest = hashlib.sha256((src / "config.json").read_bytes() + (src / MARKER).read_bytes())
    made = (src / MARKER).stat().st_mtime_ns
    return {"export": checkpoint.FORMAT, "source": digest.hexdigest(), "made": made, "max_shard": max_shard}


def _entry(name: str, slot: Slot, store: ts.TensorStore, dtype: str | None) -> Entry:
    """The official tensor that is `store[slot.index]`; `dtype` if it was narrower than the store."""
    stored = store.dtype.numpy_dtype
    kind = _DTYPES[dtype] if dtype else stored

    def read() -> Iterator[NDArray[Any]]:
        for first, last in checkpoint.windows_of(store, len(slot.index)):
            try:
                values = store[(*slot.index, slice(first, last))].read().result()
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"{name} cannot be read ({checkpoint.short(error)}): convert the model again"
                ) from error
            yield narrow(values, kind)

    return Entry(name, kind, slot.shape, read)


def narrow(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in the narrower dtype that they once had: exact, also for the bits of a bfloat16 NaN."""
    if values.dtype == np.float32 and dtype.name == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(dtype)
    return values.astype(dtype, copy=False)
