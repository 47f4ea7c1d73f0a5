"""Trains a model.

    python -m m1jax.train --config FILE.toml [--mesh AXES] [--profile]

FILE.toml names the stage (pretrain, sft, rl), model, data and all the rest; m1jax/train/settings.py lists the keys,
scripts/configs/ has examples. Killed at any moment, the same command goes on from the last checkpoint. The trained
model is in OUT/model; factors trained beside one ([lora]) are in OUT/adapter. On several machines every process runs
the same command, with --coordinator, and mesh splits the run; OUT and the data are seen by all. Exit code 2 is bad
input or a step that was stopped, 130 Ctrl-C.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from m1jax import distributed
from m1jax.arguments import Parser
from m1jax.errors import main_guard
from m1jax.train import settings as s


def parser() -> Parser:
    """The command line."""
    out = Parser(prog="python -m m1jax.train", description=__doc__)
    out.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings, a TOML file")
    out.add_argument("--mesh", metavar="AXIS=N,…", help="instead of the file's, e.g. fsdp=2,expert=4; auto chooses")
    out.add_argument("--profile", action="store_true", help="write a trace of three steps to OUT/profile")
    distributed.add_arguments(out)
    return out


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = parser().parse_args(argv)
    distributed.check(args)
    settings = s.read(args.config)
    if args.mesh is not None:
        settings = dataclasses.replace(settings, mesh=args.mesh)
    distributed.start(args)
    # Importing jax takes seconds; --help and bad settings come before.
    if settings.stage == "rl":
        from m1jax.rl.stage import run
    else:
        from m1jax.train.supervised import run
    run(settings, profile=args.profile)
    made, use = f"{settings.out}/model", f"{settings.out}/model"
    if settings.lora.rank:
        made, quantize = f"{settings.out}/adapter", settings.lora.quantize
        use = f"{settings.model.path} --adapter {made} --dtype {settings.model.dtype}"
        use += f" --quantize {quantize}" if quantize else ""
    print(f"{made}: complete. Try: python -m m1jax.generate --model {use} --prompt …")
    return 0


if __name__ == "__main__":
    main()
