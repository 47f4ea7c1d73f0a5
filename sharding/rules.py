"""Which mesh axes each logical axis is split over: one table per use, and specs for every array of a model from it.

The logical axes of parameters and state are declared in `m1jax.params`. A table gives for each a tuple of mesh axes;
the empty tuple is "not split". Nothing is dropped silently: an axis that does not divide, is unknown, or is wanted
twice in one array raises `UserError`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantization, group_of
from m1jax.lora.adapted import IN_AXES, factor_axes
from m1jax.params import STATE_AXES, ParamSpec, names_of, param_table
from m1jax.sharding.mesh import AXES

Rules = Mapping[str, tuple[str, ...]]
AnyMesh = Mesh | AbstractMesh

_WHOLE = (
    *("layer", "page", "qkv", "gate_up", "head_dim", "value_dim", "router", "rank", "channel", "hidden"),
    "expert_hidden",
)

# Rows over data and expert: attention of different rows, then an exchange between the experts' devices.
_SERVE: Rules = {
    **dict.fromkeys(_WHOLE, ()),
    "batch": ("data", "expert"),
    "sequence": ("seq",),
    "cache": ("seq",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "shared_width": ("tensor",),
    "experts": ("seq", "expert"),
    "expert_width": ("tensor",),
}

# No tensor axis: the devices that share out the experts share out the heads as well, and read the same rows.
_SERVE_WITHOUT_TENSOR: Rules = {
    **_SERVE,
    "batch": ("data",),
    **dict.fromkeys(("heads", "kv_heads", "vocab", "shared_width"), ("expert",)),
}

# Whatever repeats a matrix splits its hidden axis instead (FSDP); the expert axis holds other rows, as fsdp does.
_TRAIN: Rules = {
    **_SERVE,
    "batch": ("data", "fsdp", "expert"),
    "hidden": ("fsdp", "seq", "expert"),
    "expert_hidden": ("fsdp",),
}


def rules_of(mesh: AnyMesh) -> Rules:
    """The table for a mesh: training if it has an `fsdp` axis, else serving with or without a `tensor` axis.

    Raises:
      UserError: it has other axes.
    """
    if set(mesh.shape) not in map(set, AXES.values()):
        raise UserError(f"the mesh has axes {', '.join(mesh.shape)}: make it with m1jax.sharding.mesh.make_mesh")
    if "fsdp" in mesh.shape:
        return _TRAIN
    return _SERVE if mesh.shape["tensor"] > 1 else _SERVE_WITHOUT_TENSOR


def shards(mesh: AnyMesh, axis: str) -> int:
    """How many ways a logical axis is split."""
    return math.prod(mesh.shape[name] for name in rules_of(mesh)[axis])


def spec(
    mesh: AnyMesh, name: str, axes: tuple[str, ...], shape: tuple[int, ...], rules: Rules | None = None
) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Args:
      mesh: the mesh.
      name: of the array, for messages.
      axes: logical axis of each dimension.
      shape: size of each dimension.
      rules: another table than that of the mesh.

    Raises:
      UserError: a logical or mesh axis is unknown, a mesh axis is wanted by two dimensions, or a size does not divide.
    """
    rules = rules_of(mesh) if rules is None else rules
    taken: dict[str, str] = {}
    out: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise UserError(f"{name}: axis {axis!r} is in no rule: the rules know {', '.join(sorted(rules))}")
        for mesh_axis in rules[axis]:
            if mesh_axis not in mesh.shape:
                raise UserError(
                    f"{name}: {axis} is to be split over {mesh_axis!r}, which this mesh has not: its axes are "
                    f"{', '.join(mesh.shape)}"
                )
            if mesh_axis in taken:
                raise UserError(
                    f"{name}: {taken[mesh_axis]} and {axis} are both to be split over mesh axis {mesh_axis!r}: "
                    "give one of them another axis"
                )
            taken[mesh_axis] = axis
        _divides(mesh, name, axis, size, rules[axis])
        out.append(rules[axis] or None)
    return PartitionSpec(*out)


def _divides(mesh: AnyMesh, name: str, axis: str, size: int, over: tuple[str, ...]) -> None:
    ways = math.prod(mesh.shape[a] for a in over)
    if size % ways:
        fitting = [str(n) for n in range(1, min(size, 512) + 1) if size % n == 0]
        raise UserError(
            f"{name}: {axis} = {size} cannot be split {ways} ways (mesh axis "
            f"{' × '.join(f'{a}={mesh.shape[a]}' for a in over)}): sizes that work are {', '.join(fitting)}"
        )


def check(config: M1Config, mesh: AnyMesh, quantize: Quantization | None = None) -> None:
    """Raises `UserError` if the mesh does not divide the model's parameters, experts quantised or not, or states."""
    param_specs(config, mesh, quantize)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    # The state has the heads of the parameters; only a model without a kind of layers could have them unsplit.
    _divides(mesh, "state", "heads", heads, rules_of(mesh)["heads"])
    _divides(mesh, "cache", "kv_heads", keys, rules_of(mesh)["kv_heads"])
    ways, context = shards(mesh, "cache"), config.max_position_embeddings
    # Of serving: caches are as long as a power of two, or as the context.
    if "fsdp" not in mesh.shape and (ways & (ways - 1) or context % ways):
        raise UserError(f"mesh axis seq={ways} cannot split caches: take a power of two that divides {context} tokens")


def param_specs(config: M1Config, mesh: AnyMesh, quantize: Quantization | None = None) -> dict[str, PartitionSpec]:
    """The partition of every parameter by its path. Raises `UserError`."""
    try:
        table = param_table(config, quantize)
    except ValueError as error:
        raise UserError(f"the experts cannot be held in {quantize}: {error}") from None
    return {path: spec(mesh, path, p.axes, p.shape) for path, p in table.items()}


def param_sharding(mesh: AnyMesh, path: str, param: ParamSpec) -> NamedSharding:
    """Where one parameter lies. Raises `UserError`."""
    return NamedSharding(mesh, spec(mesh, path, param.axes, param.shape))


def shardings(config: M1Config, mesh: AnyMesh, tree: Any) -> Any:
    """Where everything in a tree lies: `tree` with a `NamedSharding` for each array.

    Args:
      config: the model's.
      mesh: the mesh.
      tree: of arrays or `jax.ShapeDtypeStruct`: a model, its gradients, a state, an optimiser's state, any of them
        nested. Leaves are known by the names on their way. A parameter may consist of several arrays (quantised
        values and scales): each is split as the parameter is along the dimensions that they share, and not split
        where it has one element.

    Raises:
      UserError: as `spec`; or a leaf of more than one element is neither parameter nor state.
    """
    table = param_table(config)

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        names = names_of(path)
        where = ".".join(names)
        found = _find(names, table)
        if found is not None:
            axes = factor_axes(table[found].axes, IN_AXES[found]).get(names[-1]) if found in IN_AXES else None
            if axes is not None:
                return NamedSharding(mesh, spec(mesh, where, axes, x.shape))
            return NamedSharding(mesh, _aligned(mesh, where, table[found], x.shape))
        state = _find(names, STATE_AXES)
        if state is not None and len(STATE_AXES[state]) == len(x.shape):
            return NamedSharding(mesh, spec(mesh, where, STATE_AXES[state], x.shape))
        if math.prod(x.shape) == 1:
            return NamedSharding(mesh, PartitionSpec())
        raise UserError(f"{where}: {x.shape} is neither a parameter nor a state: no rule says where it lies")

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _find(names: list[str], table: Mapping[str, Any]) -> str | None:
    """The longest path of the table that stands in the names, one after another."""
    paths = sorted(table, key=lambda path: -path.count("."))
    for path in paths:
        parts = path.split(".")
        if any(names[i : i + len(parts)] == parts for i in range(len(names))):
            return path
    return None


def _aligned(mesh: AnyMesh, name: str, param: ParamSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of an array that belongs to a parameter: the parameter itself, or its scales."""
    spec(mesh, name, param.axes, param.shape)
    width = param.shape[-1]
    if len(shape) == len(param.shape) and 1 < shape[-1] < width:  # int4: a group's values share bytes and a scale
        axis = param.axes[-1]
        _divides(mesh, name, f"groups of {axis}", width // group_of(width), rules_of(mesh)[axis])
    kept = [
        axis if size > 1 or whole == 1 else _WHOLE[0]
        for axis, size, whole in zip(param.axes, shape, param.shape, strict=False)
    ]
    return spec(mesh, name, tuple(kept), shape)
