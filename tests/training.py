"""Small runs of `python -m m1jax.train`: their settings, their corpus, what they leave."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.train import parts
from m1jax.train import settings as s
from tests.tools import HELLO, variant

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"  # as in conftest
CACHED = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
ENVIRONMENT = os.environ | CACHED
CONFIG = variant(layer_types=("lightning", "softmax"), vocab_size=512, hidden_size=16, num_hidden_layers=2)


def write_corpus(path: Path) -> Path:
    """A config and a corpus, in `path`."""
    (path / "config.json").write_text(json.dumps(CONFIG.to_official()))
    lines = [json.dumps({"text": f"{i} + {i} = {2 * i}. " * (1 + i % 2)}) for i in range(64)]
    (path / "corpus.jsonl").write_text("\n".join(lines))
    return path


def toml(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A table of settings: 8 steps of two small rows, a checkpoint every second."""
    table: dict[str, Any] = {
        "stage": "pretrain",
        "out": str(out),
        "steps": 8,
        "model": {"config": str(folder / "config.json"), "tokenizer": str(HELLO), "dtype": "float32"},
        "data": {"files": [str(folder / "corpus.jsonl")], "length": 24, "rows": 2, "accumulate": 2, "bins": 4},
        "optimizer": {"learning_rate": 1e-2, "warmup": 2, "decay": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"tensorboard": False},
        "guard": {},
    }
    for name, value in changes.items():
        table[name] = table.get(name, {}) | value if isinstance(value, dict) else value
    return table


def write_toml(table: dict[str, Any], file: Path) -> Path:
    def line(key: str, value: Any) -> str:
        return f"{key} = {json.dumps(value)}\n"

    text = "".join(line(k, v) for k, v in table.items() if not isinstance(v, dict))
    for name, part in table.items():
        if isinstance(part, dict):
            text += f"[{name}]\n" + "".join(line(k, v) for k, v in part.items())
    file.write_text(text)
    return file


def settings(folder: Path, out: Path, **changes: Any) -> s.Settings:
    return s.parse(s.Settings, toml(folder, out, **changes))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Bit by bit: JSON holds every digit."""
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows(out)]


def events(out: Path) -> list[Any]:
    """All that a run's files for TensorBoard hold, in the order written; checksums are looked at."""
    kinds: Any = event_pb2
    found = []
    for file in sorted((out / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            for part, sum_ in ((data[:8], data[8:12]), (data[12 : 12 + size], data[12 + size : 16 + size])):
                assert masked_crc32c(part) == int.from_bytes(sum_, "little")
            found.append(kinds.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def interrupted(*_: Any) -> Any:
    """What a function is patched with where Ctrl-C is to end it."""
    raise KeyboardInterrupt


def on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs of this process take its first two devices for all there are."""
    monkeypatch.setattr(parts, "mesh_of", lambda text, *_: make_mesh(MeshShape.parse(text), "train", jax.devices()[:2]))
