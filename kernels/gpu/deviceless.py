"""A mesh of H200s that are not here, to compile for: needs jax's CUDA plugin, no GPU, driver or CUDA toolkit."""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import topologies

H200 = Path(__file__).with_name("h200.txtpb")


def mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of H200s with these axes, for abstract arrays' shardings and `jax.set_mesh`; nothing can run on it.

    Raises:
      ImportError: the CUDA plugin is not installed; says what to install.
    """
    if not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
        packages = " ".join(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
        raise ImportError(f"compiling for GPUs needs jax's CUDA plugin: pip install --no-deps {packages}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no CUDA library here to check
    devices = math.prod(axes.values())
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200.read_text(), topology=f"1x{devices}x1")
    return topologies.make_mesh(topo=topology, mesh_shape=tuple(axes.values()), axis_names=tuple(axes))
