"""Memory per device of a prefill whose tokens are split over devices, from the compiler for H200s that are not here.

    python scripts/sequence_memory.py --devices 2 4 8 --tokens 131072 [--quantize int8] [--output FILE.json]

Compiles `model.step` of the released M1 for one row of `devices × tokens` tokens on a mesh seq=devices, and prints the
bytes that every device needs: flat, if sequence parallelism keeps its promise. Needs jax's CUDA plugin, no GPU.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from m1jax.errors import main_guard
from m1jax.kernels.gpu import deviceless
from m1jax.model import abstract
from m1jax.presets import find_config
from m1jax.sharding import compiling
from m1jax.sharding.mesh import AXES
from m1jax.sharding.rules import shardings


def figures(config_name: str, devices: int, tokens: int, quantize: str | None) -> dict[str, float]:
    """Bytes on each device and seconds to compile."""
    config = find_config(config_name)
    there = deviceless.mesh({"seq": devices})
    sizes = [devices if axis == "seq" else 1 for axis in AXES["serve"]]
    mesh = Mesh(np.asarray(there.devices).reshape(sizes), AXES["serve"], axis_types=(AxisType.Auto,) * len(sizes))
    model = abstract(config, "bfloat16", quantize)  # pyright: ignore[reportArgumentType]
    T = devices * tokens
    state = jax.eval_shape(lambda model: model.init_state(1, T), model)

    def placed(tree: object) -> object:
        where = shardings(config, mesh, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "seq")))
    step = jax.jit(lambda model, state, tokens: model.step(tokens, state, logits="last"), donate_argnums=1)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        memory = step.lower(placed(model), placed(state), ids).compile().memory_analysis()
    assert memory is not None
    return {
        "devices": devices,
        "tokens": T,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }


@main_guard
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="m1-80k", help="configuration (m1-80k)")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8], help="meshes to compile for (2 4 8)")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens on each device (131072)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="hold the experts in int8 or int4")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    compiling.prepare("cuda", max(args.devices))
    rows = []
    print("| devices | tokens | arguments, GB | temporaries, GB | compiled in, s |\n|---|---|---|---|---|")
    for devices in args.devices:
        row = figures(args.config, devices, args.tokens, args.quantize)
        rows.append(row)
        gigabytes = [f"{row[name] / 1e9:.2f}" for name in ("arguments", "temporaries")]
        print(f"| {devices} | {row['tokens']} | {' | '.join(gigabytes)} | {row['seconds']} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
