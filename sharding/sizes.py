"""Bytes of a model on a mesh, exact and without its numbers; and whether the devices that are here have room."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from m1jax.config import M1Config
from m1jax.distributed import neighbours
from m1jax.errors import FRACTION, FRACTION_NAME, UserError
from m1jax.kernels.experts import Quantization
from m1jax.model import abstract
from m1jax.params import flatten
from m1jax.sharding.mesh import MeshShape, abstract_mesh, choose
from m1jax.sharding.rules import AnyMesh, shardings

# From wide to narrow: compute dtype, and what the experts are stored in.
STORAGES: tuple[tuple[str, Quantization | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
)
SPARE = 1.03  # times the parameters is recommended: a step of a few rows needs a cache and temporaries as well


def tree_bytes(config: M1Config, mesh: AnyMesh, tree: Any) -> dict[str, int]:
    """Bytes that each device holds of every array of a tree that `m1jax.sharding.rules.shardings` knows, by path."""
    places = flatten(shardings(config, mesh, tree))
    return {path: shard_bytes(places[path], leaf) for path, leaf in flatten(tree).items()}


def shard_bytes(sharding: jax.sharding.Sharding, leaf: Any) -> int:
    """Bytes that each device holds of an array."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def parameter_bytes(config: M1Config, mesh: AnyMesh, dtype: str, quantize: Quantization | None = None) -> int:
    """Bytes of parameters that each device holds."""
    return sum(tree_bytes(config, mesh, abstract(config, dtype, quantize)).values())


def require_room(
    name: str,
    config: M1Config,
    mesh: Mesh | None,
    dtype: str,
    quantize: Quantization | None = None,
    stored: bool = False,
) -> None:
    """Raises `UserError` if the parameters do not fit into the free memory of this process's devices.

    Args:
      name: of the model, for the message.
      config: the model's.
      mesh: where it is to lie; None is the first device.
      dtype: of the parameters.
      quantize: what the experts are held in, if not in that.
      stored: whether the checkpoint has them so and cannot give them otherwise.
    """
    devices = jax.devices()[:1] if mesh is None else mesh.local_devices
    shape = abstract_mesh(MeshShape()) if mesh is None else mesh
    needed = parameter_bytes(config, shape, dtype, quantize)
    on_host = devices[0].platform == "cpu"  # all devices share the host's memory, and what they hold alike
    if on_host and mesh is not None:
        needed = _distinct_bytes(config, mesh, dtype, quantize)
    free = free_memory(devices)
    if needed <= free:
        return
    where = "this machine" if on_host else f"each of {1 if mesh is None else mesh.size} devices"
    on_gpu = devices[0].platform == "gpu"
    part = f"; jax takes part of a GPU alone unless {FRACTION_NAME}={FRACTION}" if on_gpu else ""
    held = f"{dtype} and {quantize}" if quantize else dtype
    raise UserError(
        f"{name} needs {needed / 1e9:.1f} GB of memory on {where} in {held}, {free / 1e9:.1f} GB are free: "
        + remedy(config, dtype, free, len(jax.devices()), on_host, quantize, stored)
        + part
    )


def free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free on each of the devices, or to this process of the host, whose memory CPU devices share.

    Processes on one machine are taken to have equal shares of what is free of it.
    """
    return host_memory() // neighbours() if devices[0].platform == "cpu" else min(map(device_memory, devices))


def remedy(
    config: M1Config,
    dtype: str,
    free: float,
    present: int,
    on_host: bool = False,
    quantize: Quantization | None = None,
    stored: bool = False,
) -> str:
    """What would fit into `free` bytes per device: the widest dtype on as few devices, first of those present.

    With `on_host` the devices are processes on machines of so much memory. Experts that are `stored` quantised stay so.
    """
    thing = "machine" if on_host else "device"
    storages = STORAGES[[kind for kind, _ in STORAGES].index(dtype) :]
    if quantize is not None:
        own: tuple[tuple[str, Quantization | None], ...] = ((dtype, quantize), ("bfloat16", quantize))
        storages = own if stored else (*own, ("bfloat16", "int4"))
    here = [1] if on_host else [present, *[1] * (present > 1)]
    for count in [*here, *(n for n in (2**i for i in range(1, 10)) if n > max(here))]:
        for kind, experts in storages:
            try:
                shape = choose(config, count, memory=free / 1e9, quantize=experts)
                each = parameter_bytes(config, abstract_mesh(shape), kind, experts)
            except UserError:  # this many do not divide the model
                continue
            if SPARE * each <= free:
                options = f"--dtype {kind}" + f" --quantize {experts}" * bool(experts and not stored)
                if count == 1:
                    return f"{options} fits, {each / 1e9:.1f} GB on one {thing}"
                return f"{options} --mesh {shape} fits, {each / 1e9:.1f} GB on each of {count} {thing}s"
    return f"no mesh of up to 512 {thing}s of this size holds it"


def _distinct_bytes(config: M1Config, mesh: Mesh, dtype: str, quantize: Quantization | None) -> int:
    """Bytes of the different blocks that the devices of this process hold."""
    model = abstract(config, dtype, quantize)
    places = flatten(shardings(config, mesh, model))
    total = 0
    for path, leaf in flatten(model).items():
        blocks = places[path].addressable_devices_indices_map(leaf.shape).values()
        total += len(set(map(str, blocks))) * shard_bytes(places[path], leaf)
    return total


def device_memory(device: jax.Device) -> int:
    """Free bytes of an accelerator."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise UserError(f"{device} does not say how much memory it has")
    return stats["bytes_limit"] - stats["bytes_in_use"]


def host_memory() -> int:
    """Bytes of memory that this process can take, within the limits of its container."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        pages = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        used = int((group / "memory.current").read_text()) - int(cached)
        return min(pages, int((group / "memory.max").read_text()) - used)  # ValueError: "max", no limit
    except (OSError, KeyError, ValueError):
        return pages
