"""How much memory each process takes to load a model onto a mesh, beside the bytes of its shards.

    python scripts/random_checkpoint.py /tmp/big
    for i in 0 1 2 3; do
        JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python scripts/loading_memory.py /tmp/big --mesh expert=4,tensor=2 \\
            --coordinator localhost:8476 --num-processes 4 --process-id $i &
    done; wait

Without --coordinator it is one process. The memory is what the process's peak has grown by since before the loading.
"""

import argparse
from pathlib import Path

import numpy as np

from m1jax import distributed
from m1jax.errors import main_guard
from m1jax.params import flatten
from m1jax.runtime import peak_memory


@main_guard
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder")
    parser.add_argument("--mesh", default="auto", metavar="AXIS=N,…", help="where the model lies (auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of weights (bfloat16)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="hold the experts so")
    distributed.add_arguments(parser)
    args = parser.parse_args()
    distributed.check(args)
    distributed.start(args)
    from jax.experimental import multihost_utils

    import m1jax

    distributed.wait("all are there")  # what the exchange needs is there as well
    before = peak_memory()["process"]
    model = m1jax.load(args.model, args.dtype, args.quantize, mesh=args.mesh)
    # Devices of a process that hold the same block share its buffer.
    held = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in flatten(model).values()
        for shard in array.addressable_shards
    }
    megabytes = np.asarray([sum(held.values()), peak_memory()["process"] - before]) // 10**6
    rows = np.asarray(multihost_utils.process_allgather(megabytes.astype(np.int32))).reshape(-1, 2)
    for index, (shards, grown) in enumerate(rows):
        print(f"process {index}: {shards / 1e3:.2f} GB of shards, {grown / 1e3:.2f} GB more memory at the peak")


if __name__ == "__main__":
    main()
