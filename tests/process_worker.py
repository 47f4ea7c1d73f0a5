"""One process of several: `python -m tests.process_worker TASK COORDINATOR COUNT INDEX DEVICES ARGS…`."""

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import m1jax
from m1jax import distributed, loading
from m1jax.errors import main_guard
from m1jax.lora.adapter import save_adapter
from m1jax.lora.factors import Lora
from m1jax.params import flatten
from m1jax.saving import save
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.rules import shardings
from tests.tools import SMALL


def copy(source: str, target: str, mesh: str, dtype: str) -> None:
    """Loads a checkpoint onto a mesh and saves it; every process has its share of the experts only."""
    read: dict[str, int] = {}
    open_parameters = loading.open_parameters

    def counting(*args: Any) -> loading.Source:
        opened = open_parameters(*args)

        def reader(name: str, *block: Any) -> Any:
            out = opened.read(name, *block)
            read[name] = read.get(name, 0) + out.size
            return out

        return opened._replace(read=reader)

    loading.open_parameters = counting
    model = m1jax.load(source, dtype, mesh=mesh)
    for name, array in flatten(model).items():
        own = {str(shard.index): shard.data.size for shard in array.addressable_shards}
        assert read.get(name, 0) == sum(own.values()), f"{name}: not each block that is here once"
    assert read["moe.gate_up"] == flatten(model)["moe.gate_up"].size // jax.process_count()
    save(model, target)
    print(f"process {jax.process_index()} of {jax.process_count()} has saved", flush=True)


def adapt(folder: str) -> None:
    """Saves factors that are split over the processes, outside any mesh."""
    mesh, lora = make_mesh(MeshShape(fsdp=jax.device_count()), "train"), Lora.of(SMALL, 2, 2.0, ("*",))
    places = shardings(SMALL, mesh, lora.abstract(SMALL))
    factors = jax.jit(functools.partial(lora.init, SMALL), out_shardings=places)(jax.random.key(0))
    save_adapter(factors, Path(folder), lora, SMALL, "")


def die(victim: str) -> None:
    """Exchanges numbers until one process is killed in the middle of a step."""
    mesh = make_mesh(MeshShape(data=jax.device_count()))
    where = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((jax.device_count(),), where, lambda _: np.ones((1,), np.float32))
    step = jax.jit(lambda x: x / jnp.sum(x), out_shardings=where)
    for turn in range(100_000):
        if turn == 20 and jax.process_index() == int(victim):
            step(x)  # the others wait for its part
            os.kill(os.getpid(), 9)
        x = step(x).block_until_ready()


def bad(_: str) -> None:
    """Fails on one process only."""
    if jax.process_index() == 1:
        raise m1jax.UserError("this machine lacks the file")
    distributed.wait("never")


@main_guard
def main() -> None:
    task, coordinator, count, index, devices, *args = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    distributed.start(argparse.Namespace(coordinator=coordinator, num_processes=int(count), process_id=int(index)))
    {"copy": copy, "adapt": adapt, "die": die, "bad": bad}[task](*args)


if __name__ == "__main__":
    main()
