"""Random checkpoints as files, and ways to damage them."""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from m1jax.config import M1Config
from m1jax.safetensors import Entry, read_folder, write_folder
from m1jax.weights import Layout, expected

DATA = Path(__file__).parent / "data"
TINY = DATA / "m1_tiny"
M1_NAMES = lzma.decompress((DATA / "m1_names.txt.xz").read_bytes()).decode().split("\n")

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}


def random_tensors(
    config: M1Config, dtypes: tuple[str, ...] = ("float32",), layout: Layout = "official", seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Weights under their names, of dtypes drawn from the given ones; now and then infinity, NaN and negative zero."""
    random = np.random.default_rng(seed)
    out = {}
    for name, slot in expected(config, layout).items():
        values = random.standard_normal(slot.shape).astype(DTYPES[random.choice(dtypes)])
        values.reshape(-1)[:3] = random.choice([np.inf, np.nan, -0.0, 1e-7, 0.5], 3)[: values.size]
        out[name] = values
    return out


def write_checkpoint(
    folder: Path, config: M1Config, tensors: dict[str, NDArray[Any]], max_shard: int = 20_000, **extra: Any
) -> Path:
    """A folder with config.json and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config.to_official(), **extra}), encoding="utf-8")
    entries = [Entry(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()]
    write_folder(folder, entries, max_shard)
    return folder


def split_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    """The inverse of `split_header`."""
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def same_bits(ours: dict[str, Any], theirs: dict[str, NDArray[Any]]) -> bool:
    """Whether tensors read from files are these: names, dtypes, shapes and every bit."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and tensor.view().tobytes() == theirs[name].tobytes()
        for name, tensor in ours.items()
    )


def golden() -> dict[str, Any]:
    return {name: tensor.view() for name, tensor in read_folder(TINY).items()}


def run(module: Any, *args: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code
