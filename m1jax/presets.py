"""Configurations that come with the package: commands that need no weights take their names instead of a folder."""

from pathlib import Path

from m1jax.config import M1Config
from m1jax.errors import UserError

FOLDER = Path(__file__).parent / "data"  # <name>.json as published


def find_config(name: str) -> M1Config:
    """The configuration that `name` stands for: a preset ("m1-80k"), a folder with a config.json, or such a file.

    Raises:
      UserError: there is no such preset, folder or file, or it is not a model's configuration.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.json"))
    if name in names:
        return M1Config.from_file(FOLDER / f"{name}.json")
    if not Path(name).exists():
        raise UserError(f"{name}: no such file or folder, and no configuration of that name: known {', '.join(names)}")
    return M1Config.from_file(name)
