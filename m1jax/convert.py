"""Converts a safetensors folder to a checkpoint that loads fast and sharded, or compares the two.

    python -m m1jax.convert SRC DST [--dtype keep|float32|bfloat16] [--quantize int8|int4] [--adapter DIR] [--overwrite]
    python -m m1jax.convert --verify SRC DST [--mesh expert=8]

SRC is a folder of safetensors in MiniMax's or transformers' layout; of DST the weights, DST/weights, are an Orbax
checkpoint, and python -m m1jax.export undoes the conversion. Memory stays at a few tensors whatever the size of SRC.
Killed at any moment, the same command continues.
"""

from collections.abc import Sequence
from pathlib import Path

from m1jax import distributed
from m1jax.arguments import Parser
from m1jax.errors import UserError, main_guard


def parser() -> Parser:
    """The command line."""
    out = Parser(prog="python -m m1jax.convert", description=__doc__)
    out.add_argument("src", type=Path, metavar="SRC", help="folder with config.json and safetensors files")
    out.add_argument("dst", type=Path, metavar="DST", help="folder to be made; tokenizer and chat template go along")
    out.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="stored dtype; with keep (default) export gives back the same bits; otherwise the router is float32",
    )
    out.add_argument(
        "--quantize", choices=("int8", "int4"), help="store the experts' weights so; they cannot be exported again"
    )
    out.add_argument(
        "--adapter", type=Path, metavar="DIR", help="add a LoRA adapter, m1jax's or PEFT's, to the weights"
    )
    distributed.add_arguments(out)
    out.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST when the new one is whole")
    out.add_argument(
        "--verify",
        action="store_true",
        help="convert nothing: compare the logits of SRC, rounded as DST was, and DST on a few prompts; exit code 1 if "
        "they differ. Of a quantised DST also, for information, against SRC unrounded",
    )
    out.add_argument("--mesh", metavar="AXIS=N,…", help="with --verify, what shares each layer; auto chooses")
    return out


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = parser().parse_args(argv)
    distributed.check(args)
    if not distributed.is_first(args):
        return 0
    if args.verify:
        if args.overwrite or args.dtype != "keep" or args.quantize or args.adapter:
            raise UserError("--verify converts nothing: it goes without --dtype, --quantize, --adapter and --overwrite")
        from m1jax.verify import verify

        return 0 if verify(args.src, args.dst, args.mesh) else 1
    if args.mesh is not None:
        raise UserError("--mesh goes with --verify: a conversion computes nothing, and any mesh loads what it makes")
    from m1jax.converting import convert

    convert(args.src, args.dst, args.dtype, args.overwrite, args.quantize, args.adapter)
    if args.adapter is None:
        print(f"{args.dst}: complete. Compare with: python -m m1jax.convert --verify {args.src} {args.dst}")
    else:
        print(f"{args.dst}: complete. Try: python -m m1jax.generate --model {args.dst} --prompt …")
    return 0


if __name__ == "__main__":
    main()
