"""The folder of an adapter as PEFT writes it: read to be trained further, or added to the weights of its model.

`adapter_config.json` says rank and alpha; `adapter_model.safetensors` has lora_A `[r, I]` and lora_B `[O, r]` of every
adapted matrix `[O, I]`, under its name in the official checkpoint. Of adapters that are only added, any matrix may have
them, those of experts, too.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from m1jax.config import M1Config
from m1jax.distributed import wait
from m1jax.errors import UserError
from m1jax.loading import ADAPTER_MARKER, Source, aligned_empty
from m1jax.lora.adapted import A, B
from m1jax.lora.factors import Factors, Lora
from m1jax.params import QUANTIZED, ParamSpec, flatten
from m1jax.safetensors import Entry, Tensor, listing, read_file, write_file
from m1jax.sharding.placing import place
from m1jax.sharding.region import everywhere, on_mesh_of
from m1jax.weights import FLOATS, Slot, expected
from m1jax.workplace import check_folder, check_space, disk_errors, open_workplace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
ENDS = {A: ".lora_A.weight", B: ".lora_B.weight"}
BASE = ".base_layer.weight"  # what PEFT saves beside the factors of an embedding or a head: the matrix as it was
OFF = (None, False, [], {})
# What would make of the same factors another model: fields of adapter_config.json, and what they may be here. Some ways
# to begin (PiSSA, OLoRA, LoftQ and others) change the weights, too.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("use_rslora",), (True, False, None)),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save"), OFF),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters", "loftq_config"), OFF),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"), OFF),
    **dict.fromkeys(("velora_config", "monteclora_config"), OFF),
}
MOST_RANK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one matrix: lora_A `[r, I]` and lora_B `[O, r]`, its place in the model, and what B A counts."""

    slot: Slot
    a: Tensor
    b: Tensor
    scale: float

    def added(self, shape: tuple[int, ...], block: tuple[slice, ...]) -> NDArray[np.float32]:
        """What is added to a block of the matrix, of which `shape` are the axes in its parameter; float32."""
        (rank, _), O = self.a.shape, self.b.shape[0]
        n = next(n for n in range(len(shape)) if math.prod(shape[:n]) == O)  # axes of channels out
        b = self.b.view().reshape(*shape[:n], rank)[block[:n]].astype(np.float32)
        a = self.a.view().reshape(rank, *shape[n:])[(slice(None), *block[n:])].astype(np.float32)
        flat = np.matmul(b.reshape(-1, rank) * np.float32(self.scale), a.reshape(rank, -1), dtype=np.float32)
        return flat.reshape(*b.shape[:-1], *a.shape[1:])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened folder: the factors by the name of their matrix in the official checkpoint."""

    folder: Path
    rank: int
    scale: float
    pairs: Mapping[str, Pair]

    def by_place(self) -> dict[tuple[str, tuple[int, ...]], Pair]:
        """The factors by parameter and index in it."""
        return {(pair.slot.target, pair.slot.index): pair for pair in self.pairs.values()}

    def check(self, lora: Lora, config: M1Config) -> None:
        """Raises `UserError` unless these are the factors that `lora` trains, of every layer."""
        if self.rank != lora.rank or not math.isclose(self.scale, lora.scale, rel_tol=1e-6):
            raise UserError(
                f"{self.folder} has rank {self.rank} and alpha {self.scale * self.rank:.9g}, [lora] rank {lora.rank} "
                f"and alpha {lora.alpha:.9g}: make them agree"
            )
        wanted = {name for name, slot in expected(config).items() if slot.target in lora.targets}
        if wanted != set(self.pairs):
            raise UserError(
                f"{self.folder} does not fit lora.targets: they differ in {listing(sorted(wanted ^ set(self.pairs)))}"
            )

    def factors(self, lora: Lora, config: M1Config, places: Mapping[str, Sharding] | None = None) -> Factors:
        """The factors to be trained further, float32, where they are to lie by path: without `places` anywhere."""
        layers: dict[str, dict[int, Pair]] = {}
        for pair in self.pairs.values():
            layers.setdefault(pair.slot.target, {})[pair.slot.index[0]] = pair

        def leaf(path: str, spec: ParamSpec) -> jax.Array:
            parameter, _, part = path.rpartition(".")
            whole = np.empty(spec.shape, np.float32)
            for layer, pair in layers[parameter].items():
                whole[layer] = (pair.a if part == A else pair.b).view().reshape(spec.shape[1:])
            if places is None:
                return jnp.asarray(whole)
            return place(lambda block: np.ascontiguousarray(whole[block]), spec.shape, whole.dtype, places[path])

        return lora.build(config, leaf)


def digest(folder: Path) -> str:
    """Changes with what an adapter adds, not with where or when it was copied to. Raises `UserError`."""
    try:
        with (folder / CONFIG).open("rb") as config, (folder / WEIGHTS).open("rb") as weights:
            return " ".join(hashlib.file_digest(file, "sha256").hexdigest() for file in (config, weights))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}: give an adapter's folder") from None


def open_adapter(folder: Path, config: M1Config) -> Adapter:
    """Opens an adapter of a model with this config.

    Raises:
      UserError: it is none, damaged, of another model, or of a kind that is more than W + scale · B A.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one with {CONFIG}")
    try:
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{folder} is not an adapter, {CONFIG} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} is not valid JSON ({error}): save the adapter again") from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} is not of LoRA: peft_type must be LORA")
    for name, allowed in ONLY.items():
        if not any(type(given.get(name)) is type(value) and given.get(name) == value for value in allowed):
            raise UserError(f"{folder}: {name} = {given[name]!r} is not supported: only W + scale · B A is")
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise UserError(f"{folder / CONFIG}: r = {rank!r} must be an integer from 1 to {MOST_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
        raise UserError(f"{folder / CONFIG}: lora_alpha = {alpha!r} must be a number above 0")
    scale = alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    return Adapter(folder, rank, scale, _pairs(folder, read_file(folder / WEIGHTS), config, rank, scale))


def _pairs(folder: Path, tensors: Mapping[str, Tensor], config: M1Config, rank: int, scale: float) -> dict[str, Pair]:
    """The factors by matrix. Raises `UserError` that names all that do not fit."""
    places = {
        name.removesuffix(".weight"): (name, slot) for name, slot in expected(config).items() if len(slot.shape) == 2
    }
    found: dict[str, dict[str, Tensor]] = {}
    problems: dict[str, list[str]] = {"of no matrix of this model": [], "there twice": []}
    for name, tensor in tensors.items():
        whole = name.removeprefix(PREFIX)
        part = next((part for part, end in ENDS.items() if whole.endswith(end)), None)
        module = whole.removesuffix(BASE if part is None else ENDS[part])
        if part is None and module in places and whole.endswith(BASE):
            continue
        if part is None or module not in places:
            problems["of no matrix of this model"].append(name)
        elif part in found.setdefault(module, {}):
            problems["there twice"].append(name)
        else:
            found[module][part] = tensor
    problems["lora_A without lora_B or the other way round"] = [m for m, parts in found.items() if len(parts) != 2]
    problems["not float32, float16 or bfloat16"] = [
        tensor.name for parts in found.values() for tensor in parts.values() if tensor.dtype.name not in FLOATS
    ]
    problems["misshapen"] = [
        f"{tensor.name} is {list(tensor.shape)}, not {list(shape)}"
        for module, parts in found.items()
        for part, shape in ((A, (rank, places[module][1].shape[1])), (B, (places[module][1].shape[0], rank)))
        if (tensor := parts.get(part)) is not None and tensor.shape != shape
    ]
    listed = [f"{what}: {listing(names)}" for what, names in problems.items() if names]
    if listed:
        raise UserError(f"{folder} does not fit the model: {'; '.join(listed)}")
    if not found:
        raise UserError(f"{folder} has no factors: it changes nothing")
    return {places[m][0]: Pair(places[m][1], parts[A], parts[B], scale) for m, parts in found.items()}


def adapted(source: Source, adapter: Adapter) -> Source:
    """The weights with the products added: in float32, then rounded once.

    Raises:
      UserError: the adapter is of experts that are stored quantised.
    """
    pairs = adapter.by_place()
    paths = {path for path, _ in pairs}
    if source.stored and not paths.isdisjoint(QUANTIZED):
        raise UserError(
            f"{adapter.folder} adapts experts, which are stored in {source.quantize}: use it with the model they are of"
        )

    def read(path: str, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if path not in paths:
            return source.read(path, spec, block, dtype)
        depth = max(len(index) for own, index in pairs if own == path)
        bounds = [range(*part.indices(size)) for part, size in zip(block, spec.shape, strict=True)]
        out = aligned_empty(tuple(map(len, bounds)), dtype)
        for index in itertools.product(*bounds[:depth]):
            pair = pairs.get((path, index))
            one = (*(slice(i, i + 1) for i in index), *block[depth:])
            values = source.read(path, spec, one, dtype if pair is None else np.dtype(np.float32))[(0,) * depth]
            if pair is not None:
                values += pair.added(spec.shape[depth:], block[depth:])
            out[tuple(i - part.start for i, part in zip(index, bounds, strict=False))] = values
        return out

    return source._replace(read=read)


def save_adapter(factors: Factors, folder: Path, lora: Lora, config: M1Config, model: str) -> None:
    """Writes factors, wherever they lie, as an adapter of the model in the folder `model`; replaces one of m1jax's.

    Every process of the factors' mesh calls this, the first one writes. Raises `UserError`.
    """
    with on_mesh_of(jax.tree.leaves(factors)[0]):
        arrays = {path: np.asarray(everywhere(x)) for path, x in flatten(factors).items()}
    if jax.process_index() == 0:
        check_folder(folder, overwrite=True)
        entries = _entries(arrays, config, lora)
        given = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": [path.rpartition(".")[2] for path in lora.targets],
        }
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open_workplace(folder, {"adapter": FORMAT}, overwrite=True) as workplace:
                check_space(workplace.path, sum(entry.nbytes for entry in entries) + (1 << 20))
                write_file(workplace.path / WEIGHTS, entries)
                (workplace.path / CONFIG).write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
                (workplace.path / ADAPTER_MARKER).write_text(json.dumps({"format": FORMAT}) + "\n", encoding="utf-8")
    wait("save: the adapter is whole")


def _entries(arrays: Mapping[str, NDArray[Any]], config: M1Config, lora: Lora) -> list[Entry]:
    """Every factor of every layer as PEFT names it."""
    out = []
    for name, slot in expected(config).items():
        if slot.target in lora.targets:
            for part, shape in ((A, (lora.rank, slot.shape[1])), (B, (slot.shape[0], lora.rank))):
                value = arrays[f"{slot.target}.{part}"][slot.index[0]].reshape(shape)
                module = PREFIX + name.removesuffix(".weight")
                out.append(Entry(module + ENDS[part], value.dtype, shape, lambda value=value: [value]))
    return out
