"""Compiles a step for accelerators that are not there, to learn what the real compiler makes of it.

The wheel of a backend is enough; no driver, no device. CPU compiles as well, for the bytes of arguments only: its
temporaries say nothing about an accelerator, since it up-casts bfloat16 and hoists weights out of loops.
"""

import dataclasses
import functools
import importlib.util
import os
import time
from typing import Literal

import jax
from jax.experimental import topologies

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.sharding.machines import Device
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.steps import Workload, make_step

Platform = Literal["cpu", "cuda", "tpu"]

_LIBTPU = "0.0.42.*"
_SM_90 = ("H100", "H800", "H200")  # what the deviceless compiler is set up for
# What keeps libtpu from asking the cloud about the machine that it is on, and from complaining of the answer.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_TPU_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}  # of the torus that the chips are wired in


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step: bytes on each device, and how long it took."""

    platform: Platform
    arguments: int
    temporaries: int
    seconds: float


def compile_step(config: M1Config, work: Workload, mesh: MeshShape, platform: Platform, device: Device) -> Compiled:
    """Compiles a step of a workload.

    Raises:
      UserError: the backend's wheel is missing, or it does not know the device.
    """
    real = make_mesh(mesh, work.use, _devices(platform, mesh.size, device))
    step = make_step(config, work, real)
    start = time.perf_counter()
    # What does not fit is to be counted as it stands: squeezing it takes the compiler minutes.
    options = {"xla_gpu_memory_limit_slop_factor": 10_000} if platform == "cuda" else None
    with jax.set_mesh(real):
        lowered = jax.jit(step.function, donate_argnums=step.donated).lower(*step.arguments)
        compiled = lowered.compile(compiler_options=options)
    memory = compiled.memory_analysis()
    seconds = time.perf_counter() - start
    return Compiled(platform, memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds)


def check_backend(platform: Platform) -> None:
    """Raises `UserError` if the wheel of a backend is missing."""
    version = jax.__version__
    if platform == "cuda" and not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
        raise UserError(
            "compiling for GPUs needs the CUDA compiler (131 MB, no GPU): pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        )
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for TPUs needs the compiler (no TPU): pip install 'libtpu=={_LIBTPU}'")


def prepare(platform: Platform, devices: int) -> None:
    """What must be set before jax makes its first array: no accelerator is looked for, CPU devices are many."""
    check_backend(platform)
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)


@functools.cache
def _devices(platform: Platform, count: int, device: Device) -> list[jax.Device]:
    if platform == "cpu":
        present = jax.local_devices(backend="cpu")
        if len(present) < count:
            raise UserError(f"{count} CPU devices are needed, {len(present)} are set up")
        return present[:count]
    if device.platform != platform:
        raise UserError(f"--compile {platform} does not compile for {device.name}, a {device.platform} device")
    if platform == "cuda" and device.name not in _SM_90:
        raise UserError(f"--compile cuda compiles for {', '.join(_SM_90)}, not for {device.name}: leave it out")
    check_backend(platform)
    if platform == "cuda":
        from m1jax.kernels.gpu import deviceless

        return list(deviceless.mesh({"device": count}).devices.flat)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=tpu_topology(device, count)).devices)


def tpu_topology(device: Device, count: int) -> str:
    """The name of so many chips, as near to a cube or a square as powers of two come: 8 of v5p are v5p:2x2x2."""
    dimensions, power = _TPU_DIMENSIONS[device.name], count.bit_length() - 1
    if count != 1 << power or count < 1 << dimensions or count > device.node:
        raise UserError(
            f"--compile tpu: no slice of {count} {device.name} is known: choose a power of two from "
            f"{1 << dimensions} to {1 << (device.node.bit_length() - 1)}"
        )
    sides = [1 << ((power + d) // dimensions) for d in range(dimensions)]
    return f"{device.name}:{'x'.join(map(str, sides))}"
