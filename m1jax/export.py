"""Turns a converted checkpoint back into safetensors in the official layout, bit for bit what was converted.

    python -m m1jax.export CKPT DST [--max-shard-size 5GB] [--overwrite]

Memory stays at a few tensors. Killed at any moment, the same command continues.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from m1jax.arguments import Parser
from m1jax.errors import main_guard

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """``5GB``, ``500 MiB`` or a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or float(found[1]) * _UNITS[found[2].upper()] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write for example 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parser() -> Parser:
    """The command line."""
    out = Parser(prog="python -m m1jax.export", description=__doc__)
    out.add_argument("src", type=Path, metavar="CKPT", help="converted checkpoint")
    out.add_argument("dst", type=Path, metavar="DST", help="folder to be made; config and tokenizer go along")
    out.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="e.g. 5GB (default) or 500MB"
    )
    out.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST when the new one is whole")
    return out


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = parser().parse_args(argv)
    from m1jax.exporting import export

    export(args.src, args.dst, args.max_shard_size, args.overwrite)
    print(f"{args.dst}: complete")
    return 0


if __name__ == "__main__":
    main()
