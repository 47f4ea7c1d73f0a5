"""M1-nano, the small model that ships with the package: where its files are, and the recipe that makes it."""

from pathlib import Path

from m1jax.errors import UserError

# config.json, model.safetensors, tokenizer: what scripts/train_nano.py --machine cpu --install puts there.
FOLDER = Path(__file__).parent / "model"


def default_model() -> Path:
    """The folder of the model that commands use where none is given.

    Raises:
      UserError: this copy of the package has no weights.
    """
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (FOLDER / name).is_file()]
    if missing:
        raise UserError(
            f"this copy of m1jax comes without its nano model ({FOLDER} lacks {', '.join(missing)}): "
            "give --model DIR, or make it with scripts/train_nano.py"
        )
    return FOLDER
