"""The picture in sharding/README.md: what each device of three meshes holds of MiniMax-M1, drawn from the rules.

    python scripts/mesh_figure.py [--output sharding/mesh.png]

A column is a mesh, a row an array; a coloured field names the logical axis of the array that a mesh axis splits, the
number at the right is what a device holds. Needs the extra `plot`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import jax

from m1jax.config import M1Config
from m1jax.errors import UserError, main_guard
from m1jax.model import abstract
from m1jax.params import STATE_AXES, param_table
from m1jax.presets import find_config
from m1jax.sharding.mesh import AXES, MeshShape, Use, abstract_mesh
from m1jax.sharding.rules import AnyMesh, rules_of, shardings

COLOURS = {"data": "#bab0ac", "fsdp": "#f28e2b", "seq": "#59a14f", "expert": "#4e79a7", "tensor": "#e15759"}
MESHES: list[tuple[str, MeshShape, Use, str, int]] = [
    ("serve, 8 devices, 8 rows", MeshShape(expert=8), "serve", "bfloat16", 8),
    ("serve, 64 devices, 64 rows", MeshShape(expert=8, tensor=8), "serve", "bfloat16", 64),
    ("train, 512 devices, float32 weights", MeshShape(fsdp=8, expert=8, tensor=8), "train", "float32", 0),
]
CONTEXT = 131072


def held(config: M1Config, mesh: AnyMesh, dtype: str, rows: int) -> dict[str, float]:
    """GB of each array on a device."""
    model = abstract(config, dtype)
    trees: list[Any] = [model]
    if rows:
        trees.append(jax.eval_shape(lambda: model.init_state(rows, CONTEXT)))
    out = {}
    for tree in trees:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, x), where in zip(leaves, jax.tree.leaves(shardings(config, mesh, tree)), strict=True):
            name = ".".join(key.name for key in path if key.name != "value")
            out[name] = math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize / 1e9
    return out


def draw(axes: Any, config: M1Config, title: str, shape: MeshShape, use: Use, dtype: str, rows: int) -> None:
    """One column."""
    mesh = abstract_mesh(shape, use)
    rules, sizes = rules_of(mesh), held(config, mesh, dtype, rows)
    names = [axis for axis in AXES[use] if mesh.shape[axis] > 1]
    logical = {name: spec.axes for name, spec in param_table(config).items()} | STATE_AXES
    for y, (name, dims) in enumerate(logical.items()):
        for x, mesh_axis in enumerate(names):
            split = [dim for dim in dims if mesh_axis in rules[dim]]
            colour = COLOURS[mesh_axis] if split else "#eeeeee"
            axes.add_patch(_box(x, y, colour if name in sizes else "white"))
            if split and name in sizes:
                axes.text(x + 0.5, y + 0.5, split[0], ha="center", va="center", fontsize=6.5, color="white")
        if name in sizes:
            axes.text(len(names) + 0.1, y + 0.5, f"{sizes[name]:.3f} GB", va="center", fontsize=6.5)
    axes.set_xlim(0, len(names) + 1)
    axes.set_ylim(len(logical), 0)
    axes.set_xticks([x + 0.5 for x in range(len(names))], [f"{axis}={mesh.shape[axis]}" for axis in names], fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(len(logical))], list(logical), fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title(f"{title}\n{sum(sizes.values()):.2f} GB each", fontsize=8)


def _box(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, color=colour, linewidth=0)


@main_guard
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sharding/mesh.png"), help="where to (sharding/mesh.png)")
    args = parser.parse_args()
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install 'm1jax[plot]'") from None
    config = find_config("m1-80k")
    widths = [1 + sum(size > 1 for size in vars(shape).values()) for _, shape, *_ in MESHES]
    figure, columns = plt.subplots(1, 3, figsize=(10, 5), sharey=True, width_ratios=widths, layout="constrained")
    for axes, mesh in zip(columns, MESHES, strict=True):
        draw(axes, config, *mesh)
    figure.savefig(args.output, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
