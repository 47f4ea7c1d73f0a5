"""For which device the program that is being traced will be compiled."""

import functools
import importlib.util
import re

import jax
from jax.sharding import AxisType, get_abstract_mesh

HOPPER = 90
_KINDS = {r"\b(H100|H200|H800|H20|GH200)\b": 90, r"\b(B200|GB200)\b": 100, r"\bA100\b": 80}


def capability() -> int | None:
    """Compute capability (90 for 9.0) of the CUDA device the current trace is for, 0 if unknown; None elsewhere.

    The device of the mesh in force (`jax.set_mesh`, also one of devices that are not here), else the default device.
    """
    abstract = get_abstract_mesh().abstract_device
    if abstract is not None:
        if abstract.platform not in ("gpu", "cuda"):
            return None
        return next((c for kind, c in _KINDS.items() if re.search(kind, abstract.device_kind)), 0)
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform not in ("gpu", "cuda"):
        return None
    found = str(getattr(device, "compute_capability", ""))
    return int(found.replace(".", "")) if re.fullmatch(r"\d+\.\d", found) else 0


def refusal() -> str | None:
    """Why a Triton kernel for Hopper cannot be called in the current trace; None if it can."""
    found = capability()
    if found is None:
        return "needs a CUDA device, and this program is not compiled for one"
    if found // 10 != HOPPER // 10:
        return f"needs compute capability 9.x (Hopper), the device has {found / 10 or 'an unknown one'}"
    mesh = get_abstract_mesh()
    split = [n for n, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
             if size > 1 and kind != AxisType.Manual]  # fmt: skip
    if split:
        return f"cannot be partitioned over mesh axes {split}: call it inside jax.shard_map"
    return missing()


@functools.cache
def missing() -> str | None:
    """What is not installed of what it takes to call Triton kernels; None if nothing."""
    absent = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(absent)}: pip install 'm1jax[cuda]'" if absent else None
