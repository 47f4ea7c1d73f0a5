"""Writes a random checkpoint in the official layout, of any size, a tensor at a time.

    python scripts/random_checkpoint.py DST [--dtype bfloat16] [--seed 0] [--max-shard-size 1GB] [KEY=VALUE …]

KEY is a field of config.json. Without any it is a model of 4.1 GB, with which the memory of a conversion is measured:

    python scripts/random_checkpoint.py /tmp/big
    /usr/bin/time -v python -m m1jax.convert /tmp/big /tmp/big-converted     # "Maximum resident set size"
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m1jax.config import M1Config
from m1jax.errors import UserError, main_guard
from m1jax.export import parse_size
from m1jax.safetensors import Entry, write_folder
from m1jax.weights import Slot, expected

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "rotary_dim": 64,
    "max_position_embeddings": 40960,
    "initializer_range": 0.02,
    "postnorm": True,
}
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROWS = 1 << 20  # elements drawn at once


def random_entries(config: M1Config, dtype: str, seed: int) -> list[Entry]:
    """The tensors of a model with normal weights (norms around 1); the router is float32, as in the released files."""

    def entry(name: str, slot: Slot) -> Entry:
        def read() -> Iterator[NDArray[Any]]:
            random = np.random.default_rng((seed, zlib.crc32(name.encode())))
            left = int(np.prod(slot.shape))
            while left:
                values = random.standard_normal(min(left, ROWS), np.float32) * np.float32(config.initializer_range)
                yield values + np.float32("norm" in name)
                left -= len(values)

        return Entry(name, DTYPES["float32" if slot.target == "moe.router" else dtype], slot.shape, read)

    return [entry(name, slot) for name, slot in expected(config).items()]


def read_fields(pairs: list[str]) -> dict[str, Any]:
    """``["head_dim=64"]`` as fields of config.json over the defaults; layers are 7 lightning, 1 softmax."""
    fields = dict(DEFAULTS)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            raise UserError(f"{pair}: expected KEY=VALUE with a JSON value") from None
        if not equals:
            raise UserError(f"{pair}: expected KEY=VALUE")
    kinds = [int(i % 8 == 7) for i in range(fields["num_hidden_layers"])]
    return {"model_type": "minimax_m1", "attn_type_list": kinds, **fields}


@main_guard
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/random_checkpoint.py", description="Writes a random checkpoint."
    )
    parser.add_argument("dst", type=Path)
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE", help="a field of config.json")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", type=parse_size, default=parse_size("1GB"))
    args = parser.parse_args()
    fields = read_fields(args.fields)
    config = M1Config.from_dict(fields)
    if args.dst.exists() and any(args.dst.iterdir()):
        raise UserError(f"{args.dst} is not empty: give a new folder")
    args.dst.mkdir(parents=True, exist_ok=True)
    (args.dst / "config.json").write_text(json.dumps(fields, indent=1))
    write_folder(args.dst, random_entries(config, args.dtype, args.seed), args.max_shard_size)


if __name__ == "__main__":
    main()
