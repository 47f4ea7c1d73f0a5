"""The model's side of the mesh: `on_mesh` runs a function on every device's own block, and inside it the collectives.

They name logical axes; which mesh axes those are split over is in `m1jax.sharding.rules`. Without a mesh, and for a
logical axis that is not split, each of them does nothing, so that the model reads the same for one device.

Gradients: `on_mesh` switches off the tracking of varying axes (`check_vma`), under which the permutation of a sort
counts as the same on all devices, and gradients through it come out wrong without a word. What is the same on several
devices then has a gradient in parts, which the collectives' own transposes add up.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from m1jax.config import M1Config
from m1jax.kernels.experts import Quantized
from m1jax.lora.adapted import Adapted
from m1jax.sharding.mesh import AXES, mesh_of
from m1jax.sharding.rules import rules_of, shardings, spec

Axes = tuple[str, ...]


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set. Raises `UserError` if it is not one of `m1jax.sharding.mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    rules_of(mesh)
    return mesh


def on_mesh_of(x: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """Where no mesh is set, sets the one of `m1jax.sharding.mesh` that an array lies on, if there is one."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh_in_use() is not None or mesh.axis_names not in AXES.values():
        return contextlib.nullcontext()
    concrete = None if isinstance(x, Tracer) else mesh_of(x)
    if concrete is not None:
        with contextlib.suppress(ValueError):  # inside `jax.jit`
            return jax.set_mesh(concrete)
    return jax.sharding.use_abstract_mesh(mesh)


def _region() -> AbstractMesh | None:
    """The mesh, inside `on_mesh`."""
    mesh = mesh_in_use()
    return mesh if mesh is not None and AxisType.Manual in mesh.axis_types else None


def on_mesh(function: Callable[..., Any], config: M1Config | None, out: Any, **named: Axes) -> Callable[..., Any]:
    """`function` as every device of the mesh in use runs it on its own block; without a mesh, itself.

    Args:
      function: of positional arguments. One that is in `named` is an array with these logical axes (or None), any
        other a tree whose leaves are known by their paths, as in `shardings`: a model, a state.
      config: the model's; None if there are no trees.
      out: the logical axes of the result: a tree of tuples of names.
      named: logical axes by argument, in the order of the arguments; the empty tuple for a tree.

    Raises:
      UserError: (at the call) an array's size does not divide.
    """
    mesh = mesh_in_use()
    if mesh is None or _region() is not None:
        return function
    rules = rules_of(mesh)

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple) and not hasattr(x, "_fields") and all(isinstance(name, str) for name in x)

    def specs_of(name: str, axes: Axes, arg: Any) -> Any:
        if arg is None:
            return None
        if axes:
            return spec(mesh, name, axes, arg.shape)
        assert config is not None
        return jax.tree.map(lambda s: s.spec, shardings(config, mesh, arg))

    def run(*args: Any) -> Any:
        ins = tuple(specs_of(name, axes, arg) for (name, axes), arg in zip(named.items(), args, strict=True))
        outs = jax.tree.map(lambda axes: PartitionSpec(*(rules[a] or None for a in axes)), out, is_leaf=is_axes)
        return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)(*args)

    return run


def everywhere(x: jax.Array) -> jax.Array:
    """x, whole on every device of the mesh in use, so that every process can read it."""
    return x if mesh_in_use() is None else lax.with_sharding_constraint(x, PartitionSpec())


def laid_out(x: jax.Array, name: str, axes: Axes) -> jax.Array:
    """x as its logical axes lie on the mesh in use; x itself without one. `name` is for messages."""
    mesh = mesh_in_use()
    return x if mesh is None else lax.with_sharding_constraint(x, spec(mesh, name, axes, x.shape))


def split_over(axis: str) -> Axes:
    """The mesh axes of more than one device that a logical axis is split over; empty outside `on_mesh`."""
    mesh = _region()
    return () if mesh is None else tuple(name for name in rules_of(mesh)[axis] if mesh.shape[name] > 1)


def ways(axis: str) -> int:
    """How many ways a logical axis is split for what surrounds the model, or inside `on_mesh`; 1 without a mesh."""
    mesh = mesh_in_use()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in rules_of(mesh)[axis])


def every_axis() -> Axes:
    """All mesh axes of more than one device, inside `on_mesh`."""
    mesh = _region()
    return () if mesh is None else tuple(name for name, size in mesh.shape.items() if size > 1)


def size_of(axes: Axes) -> int:
    """How many devices there are along these mesh axes."""
    mesh = _region()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in axes)


def index(axes: Axes) -> jax.Array | int:
    """Which block of a dimension split over these mesh axes is this device's."""
    return lax.axis_index(axes) if axes else 0


def start(axis: str, size: int) -> jax.Array | int:
    """Where this device's block of `size` begins along a logical axis."""
    return index(split_over(axis)) * size


def block(x: jax.Array, dim: int, axis: str) -> jax.Array:
    """This device's block of an array that is whole on each, along dimension `dim`."""
    over = split_over(axis)
    if not over:
        return x
    size = x.shape[dim] // ways(axis)
    return lax.dynamic_slice_in_dim(x, index(over) * size, size, dim)


def total(x: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices that a logical axis is split over."""
    over = split_over(axis)
    return lax.psum(x, over) if over else x


def greatest(x: jax.Array, axis: str) -> jax.Array:
    """The maximum over the devices that a logical axis is split over; it has no gradient."""
    over = split_over(axis)
    return lax.pmax(x, over) if over else x


def gathered(x: jax.Array, dim: int, axis: str) -> jax.Array:
    """An array that is whole along dimension `dim`, from the blocks of all devices."""
    over = split_over(axis)
    return lax.all_gather(x, over, axis=dim, tiled=True) if over else x


GATHERED = ("hidden", "expert_hidden")  # axes of parameters that are split to save memory, not to share out work


def matrix(param: nnx.Param, layer: jax.Array | int) -> tuple[Any, jax.Array | int]:
    """A stacked parameter and the layer's index in it, with whatever is split by FSDP gathered, for this layer only."""
    value, axes = param[...], param.axes
    if not any(axis in GATHERED and split_over(axis) for axis in axes):
        return value, layer
    if isinstance(value, Quantized | Adapted):  # several arrays
        axes = value.axes(axes)
    one = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, keepdims=True), value)
    return jax.tree.map(whole, one, axes), 0


def whole(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter with these logical axes, gathered along those that FSDP splits."""
    for dim, axis in enumerate(axes):
        if axis in GATHERED:
            x = gathered(x, dim, axis)
    return x


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of an embedding table `[V, M]` whose vocabulary may be split: `[..., M]` for ids `[...]`."""
    over = split_over("vocab")
    if not over:
        return table[ids]
    own = ids - index(over) * table.shape[0]
    inside = (own >= 0) & (own < table.shape[0])
    rows = table[jnp.where(inside, own, 0)]
    return lax.psum(jnp.where(inside[..., None], rows, 0), over)


def after(numbers: jax.Array, *others: jax.Array) -> jax.Array:
    """`numbers`, integers, but not before the others are there.

    XLA:CPU starts what does not hang on each other in any order, exchanges between devices in loops, too. A device that
    waits in one has a thread less for another, and when none is left all wait for good. So where an exchange stands in
    a loop, those that could go on beside it are put in an order.
    """
    for x in others if mesh_in_use() is not None else ():
        negative = (x[(0,) * x.ndim] < 0).astype(numbers.dtype)
        numbers += negative * (1 - negative)  # 0, which no compiler works out
    return numbers


def rows_of(x: jax.Array, rows: jax.Array) -> jax.Array:
    """The given rows of an array whose leading axis is the batch.

    The blocks of the devices go round, so that a device holds one of them at a time beside its own.

    Args:
      x: `[B, …]`.
      rows: int32 `[B']`, row numbers, of what this device is to have.
    """
    over = split_over("batch")
    n, me, size = size_of(over), index(over), x.shape[0]
    round_trip = [(i, (i - 1) % n) for i in range(n)]

    def look(i: jax.Array | int, carry: Any) -> Any:
        block, out = carry
        at = rows - (me + i) % n * size
        here = (at >= 0) & (at < size)
        found = block[jnp.where(here, at, 0)]
        out = jnp.where(here.reshape(-1, *(1,) * (out.ndim - 1)), found, out)
        return lax.ppermute(block, over, round_trip) if over else block, out

    return lax.fori_loop(0, n, look, (x, jnp.zeros((*rows.shape, *x.shape[1:]), x.dtype)))[1]
