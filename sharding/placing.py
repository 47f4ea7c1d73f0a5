"""Puts what is read from files onto devices: each process reads what its own devices hold, each block once.

On CPUs an array takes over the buffer that was read into, also where several devices hold the same block. Elsewhere a
block goes to its devices piece by piece, so that the host never holds more than a piece.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

Block = tuple[slice, ...]

PIECE = 256 << 20  # bytes on their way to an accelerator


def place(
    read: Callable[[Block], NDArray[Any]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: Sharding,
    *,
    stream: bool | None = None,
    piece: int = PIECE,
) -> jax.Array:
    """An array of the given layout.

    Args:
      read: gives a block of the array, one slice per axis, as an aligned buffer that it does not use again.
      shape: of the whole array.
      dtype: what `read` returns.
      sharding: where the array lies; devices of other processes are left to those.
      stream: piece by piece; None chooses (all but CPUs).
      piece: bytes of a piece.
    """
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)]
        holders.setdefault(tuple(bounds), []).append(device)
    arrays: dict[jax.Device, jax.Array] = {}
    for bounds, devices in holders.items():
        block = tuple(slice(*bound) for bound in bounds)
        streamed = devices[0].platform != "cpu" if stream is None else stream
        arrays |= _streamed(read, block, dtype, devices, piece) if streamed else _whole(read(block), devices)
    ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered, dtype=dtype)


def _whole(values: NDArray[Any], devices: list[jax.Device]) -> dict[jax.Device, jax.Array]:
    """The same buffer on every device; `make_array_from_callback` takes it over without a copy."""
    return {
        device: jax.make_array_from_callback(values.shape, SingleDeviceSharding(device), lambda _: values)
        for device in devices
    }


def _streamed(
    read: Callable[[Block], NDArray[Any]], block: Block, dtype: np.dtype[Any], devices: list[jax.Device], piece: int
) -> dict[jax.Device, jax.Array]:
    shape = tuple(part.stop - part.start for part in block)
    out = {device: jnp.zeros(shape, dtype, device=device) for device in devices}
    for part in pieces(shape, dtype.itemsize, piece):
        values = read(tuple(slice(b.start + p.start, b.start + p.stop) for b, p in zip(block, part, strict=True)))
        start = [p.start for p in part]
        out = {device: _write(array, jax.device_put(values, device), start) for device, array in out.items()}
        jax.block_until_ready(list(out.values()))  # the piece has left the host
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, start: list[jax.Array]) -> jax.Array:
    return lax.dynamic_update_slice(whole, part, start)


def pieces(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Block]:
    """Splits an array into blocks, contiguous in memory, of at most `limit` bytes (or one row of the last axis)."""
    axis = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) * itemsize <= limit), len(shape) - 1)
    rows = max(1, limit // (math.prod(shape[axis + 1 :]) * itemsize)) if shape else 1
    rest = tuple(slice(0, size) for size in shape[axis + 1 :])
    for index in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis] if shape else 0, rows):
            yield (*(slice(i, i + 1) for i in index), slice(first, min(first + rows, shape[axis])), *rest)
