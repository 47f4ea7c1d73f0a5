"""The mesh: five named axes, how a command line spells them, presets for known machines, and a chooser.

| axis | what is split over it |
|---|---|
| `data` | rows of the batch; parameters are repeated |
| `fsdp` | rows of the batch; parameters are split, and gathered layer by layer where they are used (training only) |
| `seq` | tokens of a sequence, positions of the cache, experts |
| `expert` | experts, and either rows of the batch or, on serving meshes without `tensor`, heads |
| `tensor` | heads, width of each expert, vocabulary: the axis with most traffic, so it lies innermost |

A mesh with an `fsdp` axis is a training mesh; its rules are in `m1jax.sharding.rules`.

Why the axes are Auto, with the model inside one `shard_map`: Explicit axes want an `out_sharding` in every product,
refuse to sort along a sharded axis, and no Pallas or Triton kernel runs under them. Auto axes alone leave the kernels
unsplit and let the compiler choose how tokens, experts and states travel, which is what a model of this size is about.
So whatever surrounds the model (sampling, optimiser, metrics) is Auto, and the model itself runs Manual: each device
on its own block, with every collective written where it happens, and every kernel called with local shapes.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from m1jax.config import M1Config
from m1jax.errors import UserError

Use = Literal["serve", "train"]

AXES: dict[Use, tuple[str, ...]] = {
    "serve": ("data", "seq", "expert", "tensor"),
    "train": ("data", "fsdp", "seq", "expert", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices along each axis."""

    data: int = 1
    fsdp: int = 1
    seq: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 1:
                raise UserError(f"mesh: {axis}={size} must be 1 or more")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads ``"data=1,expert=8,tensor=1"``; axes left out are 1. Raises `UserError`."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (piece.strip() for piece in part.partition("="))
            if axis not in AXES["train"]:
                raise UserError(f"mesh: unknown axis {axis!r} in {text!r}: the axes are {', '.join(AXES['train'])}")
            if axis in sizes:
                raise UserError(f"mesh: {axis} is given twice in {text!r}")
            if not (size.isascii() and size.isdigit()):
                raise UserError(f"mesh: {part.strip()!r} in {text!r} is not of the form {axis}=8")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(dataclasses.astuple(self))

    def __str__(self) -> str:
        always = ("data", "expert", "tensor")
        sizes = dataclasses.asdict(self).items()
        return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1 or axis in always)


class Preset(NamedTuple):
    """A mesh for M1 on a known machine, and the narrowest weights it needs there (None: it does not fit at all)."""

    devices: int
    memory: int  # GB of each
    mesh: MeshShape
    weights: Literal["float32", "bfloat16", "int8", "int4"] | None


# Heads (64, 8 of them keys) are split at most 8 ways, so that larger machines split experts along a second axis.
PRESETS: dict[Use, tuple[Preset, ...]] = {
    "serve": (
        Preset(1, 80, MeshShape(), None),
        Preset(8, 80, MeshShape(expert=8), "int8"),
        Preset(8, 141, MeshShape(expert=8), "bfloat16"),
        Preset(16, 80, MeshShape(expert=2, tensor=8), "bfloat16"),
        Preset(64, 80, MeshShape(expert=8, tensor=8), "bfloat16"),
        Preset(512, 80, MeshShape(data=8, expert=8, tensor=8), "bfloat16"),
    ),
    "train": (
        Preset(1, 80, MeshShape(), None),
        Preset(8, 80, MeshShape(expert=8), None),
        Preset(8, 141, MeshShape(expert=8), None),
        Preset(16, 80, MeshShape(fsdp=2, expert=8), None),
        Preset(64, 80, MeshShape(fsdp=8, expert=8), None),
        Preset(512, 80, MeshShape(fsdp=8, expert=8, tensor=8), "float32"),
    ),
}


def choose(
    config: M1Config,
    devices: int,
    use: Use = "serve",
    memory: float = 80,
    quantize: Literal["int8", "int4"] | None = None,
) -> MeshShape:
    """A mesh for so many devices of `memory` GB each: the machine's preset, or the one that splits parameters most.

    `quantize` is what the experts are held in. A preset serves the released M1; a model that it does not divide, or an
    unknown machine, gets the first mesh that divides the model, of those with fewest repeated parameters and then the
    least traffic within a layer.

    Raises:
      UserError: no mesh of so many devices divides the model.
    """
    from m1jax.sharding.rules import check  # it builds on this module

    known = [preset for preset in PRESETS[use] if preset.devices == devices]
    known.sort(key=lambda preset: abs(preset.memory - memory))
    reasons = []
    for shape in (*(preset.mesh for preset in known), *factorings(devices, use)):
        try:
            check(config, abstract_mesh(shape, use), quantize)
        except UserError as error:
            reasons.append(str(error))
        else:
            return shape
    raise UserError(f"no mesh of {devices} devices divides this model: {reasons[-1]}")


def factorings(devices: int, use: Use, sequence: bool = False) -> Iterator[MeshShape]:
    """Meshes of so many devices, those that split most first; `data` or `fsdp` takes what is left over.

    With `sequence` those with a `seq` axis come as well, after those without.
    """
    left = "data" if use == "serve" else "fsdp"
    for seq in _divisors(devices) if sequence else [1]:
        for rows in _divisors(devices // seq):
            for tensor in _divisors(devices // seq // rows):
                yield MeshShape(**{left: rows}, seq=seq, expert=devices // seq // rows // tensor, tensor=tensor)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_mesh(shape: MeshShape, use: Use = "serve", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (None: all of them, of all processes); give it to `jax.set_mesh`.

    Raises:
      UserError: the mesh needs another number of devices, or has an axis that this use has not.
    """
    devices = jax.devices() if devices is None else devices
    if shape.size != len(devices):
        raise UserError(
            f"mesh {shape} needs {shape.size} devices, {len(devices)} are present: choose sizes whose product is "
            f"{len(devices)}"
        )
    names, sizes = _axes(shape, use)
    return Mesh(_placed(sizes, devices), names, axis_types=(AxisType.Auto,) * len(names))


def _placed(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices in an array of this shape; those that differ in the last axes only are the nearest.

    `jax.make_mesh` refuses GPUs of more than one machine, and TPU meshes that split an axis of the torus.
    """
    # TPUs of a single slice may have no such attribute.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = next((axis for axis, size in enumerate(sizes) if size % slices == 0), None)
    if outer is None:
        raise UserError(f"mesh {sizes} over {slices} TPU slices: one of its sizes must be a multiple of {slices}")
    across = tuple(slices if axis == outer else 1 for axis in range(len(sizes)))
    within = tuple(size // n for size, n in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def parsed_mesh(
    text: str, config: M1Config, use: Use = "serve", quantize: Literal["int8", "int4"] | None = None
) -> Mesh:
    """The mesh of all devices that a text such as "expert=8" or "auto" says. Raises `UserError`."""
    count = jax.device_count()
    return make_mesh(choose(config, count, use, quantize=quantize) if text == "auto" else MeshShape.parse(text), use)


def abstract_mesh(shape: MeshShape, use: Use = "serve") -> AbstractMesh:
    """The same without devices, to compute shapes and specs with. Raises `UserError`."""
    names, sizes = _axes(shape, use)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def _axes(shape: MeshShape, use: Use) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if use == "serve" and shape.fsdp > 1:
        raise UserError(f"mesh {shape}: fsdp is an axis of training only: use data, expert or tensor")
    return AXES[use], tuple(getattr(shape, axis) for axis in AXES[use])


def mesh_of(x: jax.Array) -> Mesh | None:
    """The mesh that an array lies on; None if on a single device."""
    sharding = x.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None
