"""Puts what is read from files onto devices: each process reads what its own devices hold, each block once.

On CPUs an array takes over the buffer that was read into, also where several devices hold the same block. Elsewhere
blocks go to their devices piece by piece, so that the host never holds more than a piece.
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
Bounds = tuple[tuple[int, int], ...]  # of a block: first index and the one behind the last, of each axis

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
      piece: bytes of a piece, of all blocks that lie beside each other along the last axis together.
    """
    blocks: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = (part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        blocks.setdefault(tuple(bounds), []).append(device)
    arrays: dict[jax.Device, jax.Array] = {}
    if any(d.platform != "cpu" for d in sharding.addressable_devices) if stream is None else stream:
        # Blocks beside each other along the last axis together: what is read for one is quantised for all.
        beside: dict[Bounds, dict[Bounds, list[jax.Device]]] = {}
        for bounds, devices in blocks.items():
            beside.setdefault(bounds[:-1], {})[bounds] = devices
        for group in beside.values():
            arrays |= _streamed(read, group, dtype, piece)
    else:
        for bounds, devices in blocks.items():
            arrays |= _whole(read(tuple(slice(*bound) for bound in bounds)), devices)
    ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered, dtype=dtype)


def _whole(values: NDArray[Any], devices: list[jax.Device]) -> dict[jax.Device, jax.Array]:
    """The same buffer on every device; `make_array_from_callback` takes it over without a copy."""
    return {
        device: jax.make_array_from_callback(values.shape, SingleDeviceSharding(device), lambda _: values)
        for device in devices
    }


def _streamed(
    read: Callable[[Block], NDArray[Any]], group: dict[Bounds, list[jax.Device]], dtype: np.dtype[Any], piece: int
) -> dict[jax.Device, jax.Array]:
    """Blocks of one shape, piece by piece: the first piece of each, then the second of each."""
    shape = tuple(stop - first for first, stop in next(iter(group)))
    out = {device: jnp.zeros(shape, dtype, device=device) for devices in group.values() for device in devices}
    for part in pieces(shape, dtype.itemsize, piece // len(group)):
        start = [p.start for p in part]
        for bounds, devices in group.items():
            values = read(tuple(slice(at + p.start, at + p.stop) for (at, _), p in zip(bounds, part, strict=True)))
            out |= {device: _write(out[device], jax.device_put(values, device), start) for device in devices}
        jax.block_until_ready(list(out.values()))  # the pieces have left the host
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
