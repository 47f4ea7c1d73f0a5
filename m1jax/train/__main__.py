"""Trains a model.

    python -m m1jax.train --config FILE.toml [--profile]

FILE.toml names the stage (pretrain, sft, rl), model, data and all the rest; m1jax/train/settings.py lists the keys,
scripts/configs/ has examples. Killed at any moment, the same command goes on from the last checkpoint. The trained
model is in OUT/model. Exit code 2 is bad input or a step that was stopped, 130 Ctrl-C.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from m1jax.errors import main_guard
from m1jax.train import settings as s


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m m1jax.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings, a TOML file")
    out.add_argument("--profile", action="store_true", help="write a trace of three steps to OUT/profile")
    return out


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = parser().parse_args(argv)
    settings = s.read(args.config)
    # Importing jax takes seconds; --help and bad settings come before.
    if settings.stage == "rl":
        from m1jax.rl.stage import run
    else:
        from m1jax.train.loop import run
    run(settings, profile=args.profile)
    print(f"{settings.out}/model: complete. Try: python -m m1jax.generate --model {settings.out}/model --prompt …")
    return 0


if __name__ == "__main__":
    main()
