"""The folder of an adapter as PEFT writes it: read to be trained further, or added to the weights of its model.

`adapter_config.json` says rank and alpha; `adapter_model.safetensors` has lora_A `[r, I]` and lora_B `[O, r]` of every
adapted matrix `[O, I]`, under its name in the official checkpoint. Of adapters that are only added, any matrix may have
them, those of experts, too.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from m1jax.config import M1Config
from m1jax.distributed import wait
from m1jax.errors import UserError
from m1jax.loading import MARKER, Source, aligned_empty
from m1jax.lora.adapted import A, B
from m1jax.lora.factors import Factors, Lora
from m1jax.params import QUANTIZED, ParamSpec, flatten, nest
from m1jax.safetensors import Tensor, listing, read_file
from m1jax.sharding.placing import place
from m1jax.sharding.region import everywhere
from m1jax.weights import Slot, expected
from m1jax.workplace import check_folder, check_space, disk_errors, open_workplace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
ENDS = {A: ".lora_A.weight", B: ".lora_B.weight"}
# What would make of the same factors another model: fields of adapter_config.json, and what they may be here.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}


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

    @property
    def digest(self) -> str:
        """Changes with what is in the folder."""
        stat = (self.folder / WEIGHTS).stat()
        return f"{(self.folder / CONFIG).read_text(encoding='utf-8')} {stat.st_size} {stat.st_mtime_ns}"

    def by_place(self) -> dict[tuple[str, tuple[int, ...]], Pair]:
        """The factors by parameter and index in it."""
        return {(pair.slot.target, pair.slot.index): pair for pair in self.pairs.values()}

    def check(self, lora: Lora, config: M1Config) -> None:
        """Raises `UserError` unless these are the factors that `lora` trains, of every layer."""
        if (self.rank, self.scale) != (lora.rank, lora.scale):
            raise UserError(
                f"{self.folder} has rank {self.rank} and alpha {self.scale * self.rank:g}, [lora] rank {lora.rank} and "
                f"alpha {lora.alpha:g}: make them agree"
            )
        wanted = {name for name, slot in expected(config).items() if slot.target in lora.targets}
        if wanted != set(self.pairs):
            raise UserError(
                f"{self.folder} does not fit lora.targets: they differ in {listing(sorted(wanted ^ set(self.pairs)))}"
            )

    def factor(self, places: Mapping[str, Any], path: str, spec: ParamSpec) -> jax.Array:
        """A factor of all layers, such as "softmax.q_proj.lora_a", where it is to lie."""
        parameter, _, part = path.rpartition(".")
        layers = {p.slot.index[0]: p.a if part == A else p.b for p in self.pairs.values() if p.slot.target == parameter}
        whole = np.stack([layers[i].view().astype(np.float32).reshape(spec.shape[1:]) for i in range(len(layers))])

        def read(block: tuple[slice, ...]) -> NDArray[Any]:
            out = aligned_empty(whole[block].shape, whole.dtype)
            out[...] = whole[block]
            return out

        return place(read, spec.shape, whole.dtype, places[path])


def open_adapter(folder: Path, config: M1Config) -> Adapter:
    """Opens an adapter of a model with this config.

    Raises:
      UserError: it is none, damaged, of another model, or of a kind that is more than W + scale · B A.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one with {CONFIG}")
    try:
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not an adapter, {CONFIG} cannot be read ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object")
    for name, allowed in ONLY.items():
        if name in given and given[name] not in allowed:
            raise UserError(f"{folder}: {name} = {given[name]!r} is not supported: only W + scale · B A is")
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not 0 < alpha < math.inf:
        raise UserError(f"{folder / CONFIG}: r = {rank!r} and lora_alpha = {alpha!r} must be numbers above 0")
    scale = alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    return Adapter(folder, rank, scale, _pairs(folder, read_file(folder / WEIGHTS), config, rank, scale))


def _pairs(folder: Path, tensors: Mapping[str, Tensor], config: M1Config, rank: int, scale: float) -> dict[str, Pair]:
    """The factors by matrix. Raises `UserError` that names all that do not fit."""
    places = {name.removesuffix(".weight"): (name, slot) for name, slot in expected(config).items()}
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        part = next((part for part, end in ENDS.items() if name.endswith(end)), None)
        module = name.removeprefix(PREFIX).removesuffix(ENDS.get(part or "", ""))
        if part is None or module not in places or len(places[module][1].shape) != 2:
            unknown.append(name)
        else:
            found.setdefault(module, {})[part] = tensor
    problems = []
    if unknown:
        problems.append(f"of no matrix of this model: {listing(unknown)}")
    alone = [module for module, parts in found.items() if len(parts) != 2]
    if alone:
        problems.append(f"lora_A without lora_B or the other way round: {listing(alone)}")
    wrong = [
        f"{tensor.name} is {list(tensor.shape)}, not {list(shape)}"
        for module, parts in found.items()
        for part, shape in ((A, (rank, places[module][1].shape[1])), (B, (places[module][1].shape[0], rank)))
        if (tensor := parts.get(part)) is not None and tensor.shape != shape
    ]
    if wrong:
        problems.append(f"misshapen: {listing(wrong)}")
    if problems:
        raise UserError(f"{folder} does not fit the model: {'; '.join(problems)}")
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
    arrays = {path: np.asarray(everywhere(x)) for path, x in flatten(factors).items()}
    if jax.process_index() == 0:
        check_folder(folder, overwrite=True)
        tensors = _tensors(nest(arrays), config, lora)
        given = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        }
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open_workplace(folder, {"adapter": FORMAT}, overwrite=True) as workplace:
                check_space(workplace.path, sum(x.nbytes for x in tensors.values()) + (1 << 20))
                save_file(tensors, workplace.path / WEIGHTS)
                (workplace.path / CONFIG).write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
                (workplace.path / MARKER).write_text(json.dumps({"adapter": FORMAT}) + "\n", encoding="utf-8")
    wait("save: the adapter is whole")


def _tensors(factors: Factors, config: M1Config, lora: Lora) -> dict[str, NDArray[Any]]:
    """Every factor of every layer as PEFT names it."""
    out = {}
    for name, slot in expected(config).items():
        if slot.target in lora.targets:
            group, _, matrix = slot.target.partition(".")
            shapes = {A: (lora.rank, slot.shape[1]), B: (slot.shape[0], lora.rank)}
            for part, shape in shapes.items():
                value = factors[group][matrix][part][slot.index[0]]
                out[PREFIX + name.removesuffix(".weight") + ENDS[part]] = np.ascontiguousarray(value.reshape(shape))
    return out
