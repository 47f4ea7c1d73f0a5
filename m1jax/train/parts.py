"""What a run is made of: model, tokenizer, mesh, optimiser; the weights that it begins with, each where it lies."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.kernels.experts import Quantization
from m1jax.loading import Source, open_parameters
from m1jax.lora.adapter import Adapter, open_adapter
from m1jax.lora.factors import Base, Lora
from m1jax.model import M1, abstract, build, init_params
from m1jax.params import ParamSpec, flatten, param_table
from m1jax.sharding import sizes
from m1jax.sharding.mesh import MeshShape, abstract_mesh, choose, make_mesh, parsed_mesh
from m1jax.sharding.placing import place
from m1jax.sharding.rules import check, shardings
from m1jax.tokenizer import Tokenizer
from m1jax.train.documents import digest
from m1jax.train.settings import Settings
from m1jax.train.step import TrainState, adamw, init_state

MOST_DEVICES = 1 << 14  # that a mesh is proposed for


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of before its first step; of what is trained there are shapes and places only."""

    settings: Settings
    config: M1Config
    tokenizer: Tokenizer | None
    mesh: Mesh
    optimizer: Any
    source: Source | None  # of the weights; None: random ones
    shapes: TrainState
    updates: int  # of the weights, in a step
    lora: Lora | None  # what is trained of the model; None: all of it
    adapter: Adapter | None  # factors to go on from

    @functools.cached_property
    def base(self) -> Base | None:
        """The model that factors are trained beside, which is read when first asked for; None without `lora`."""
        if self.lora is None or self.source is None:
            return None
        dtype, source = self.settings.model.dtype, self.source
        table = flatten(shardings(self.config, self.mesh, abstract(self.config, dtype, source.quantize)))
        leaf = functools.partial(_read, source, table, dtype)
        return Base(build(self.config, leaf, source.quantize), self.lora.scale)

    @property
    def beside(self) -> str:
        """What is trained beside what, for the identity of checkpoints; empty without `lora`."""
        if self.lora is None or self.source is None:
            return ""
        experts = self.source.quantize or self.settings.model.dtype
        how = f"rank {self.lora.rank}, alpha {self.lora.alpha}, experts in {experts}"
        return f"{how}, beside {', '.join(self.lora.targets)}"

    def model(self, state: TrainState) -> M1:
        """The model of a state, with its factors."""
        return state.model if self.base is None else self.base.with_factors(state.model)


def prepare(settings: Settings, updates: int = 1) -> Parts:
    """Model, tokenizer, mesh and optimiser of a run of so many updates a step, no weights. Raises `UserError`."""
    config = M1Config.from_file(Path(settings.model.path or settings.model.config))
    folder = settings.model.tokenizer or settings.model.path
    tokenizer = Tokenizer.load(folder) if folder and _has_tokenizer(Path(folder), settings) else None
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size}")
    given = settings.lora
    source = open_parameters(Path(settings.model.path), given.quantize or None) if settings.model.path else None
    if source is not None and source.quantize is not None and not given.rank:
        raise UserError(
            f"{settings.model.path} is quantised to {source.quantize}: train the model it came from, or factors beside "
            "this one (lora.rank)"
        )
    lora = Lora.of(config, given.rank, given.alpha, given.targets) if given.rank else None
    adapter = None if lora is None or not given.path else open_adapter(Path(given.path), config)
    if lora is not None and adapter is not None:
        adapter.check(lora, config)
    mesh = mesh_of(settings.mesh, config, None if source is None else source.quantize)
    optimizer = adamw(config, settings.optimizer, settings.steps * updates, lora)
    start = functools.partial(init_state, optimizer=optimizer)
    trained = abstract(config, "float32") if lora is None else lora.abstract(config)
    shapes = jax.eval_shape(start, trained)
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings(config, mesh, shapes)
    )
    parts = Parts(settings, config, tokenizer, mesh, optimizer, source, shapes, updates, lora, adapter)
    _require_room(parts)
    return parts


def _has_tokenizer(folder: Path, settings: Settings) -> bool:
    return bool(settings.model.tokenizer) or any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def mesh_of(text: str, config: M1Config, quantize: Quantization | None = None) -> Mesh:
    """The mesh of a setting such as "data=2,expert=4" or "auto"; one device if it is empty. Raises `UserError`."""
    if not text and jax.process_count() > 1:
        raise UserError(f"mesh is missing: {jax.process_count()} processes share a run by one, such as mesh = 'fsdp=8'")
    mesh = parsed_mesh(text, config, "train", quantize) if text else make_mesh(MeshShape(), "train", jax.devices()[:1])
    check(config, mesh, quantize)
    return mesh


def _require_room(parts: Parts) -> None:
    """Raises `UserError` if weights and moments do not fit into the free memory of this process's devices."""
    devices, settings = parts.mesh.local_devices, parts.settings
    on_host = devices[0].platform == "cpu"  # all devices share the host's memory
    needed, free = _bytes(parts, parts.mesh) * (len(devices) if on_host else 1), sizes.free_memory(devices)
    if needed <= free:
        return
    room = free / jax.local_device_count() if on_host else free
    what = "weights and moments in float32" if parts.lora is None else "the model and what is trained beside it"
    raise UserError(
        f"{settings.model.path or settings.model.config} needs {needed / 1e9:.1f} GB of memory on "
        f"{'this machine' if on_host else 'each device'} for {what}, {free / 1e9:.1f} GB are free: "
        + _remedy(parts, room)
    )


def _bytes(parts: Parts, mesh: Mesh | AbstractMesh) -> int:
    """Of weights and moments, on each device."""
    held: Any = parts.shapes
    if parts.lora is not None and parts.source is not None:
        held = (held, abstract(parts.config, parts.settings.model.dtype, parts.source.quantize))
    return sum(map(sizes.shard_bytes, jax.tree.leaves(shardings(parts.config, mesh, held)), jax.tree.leaves(held)))


def _remedy(parts: Parts, room: float) -> str:
    """A mesh of devices with so much room that holds the state: of those present, or of twice as many, and so on."""
    count = present = jax.device_count()
    less = "train a smaller model"
    if parts.lora is None and parts.source is not None:
        less += ", or factors beside this one ([lora], where experts may be int8)"
    while count <= MOST_DEVICES:
        with contextlib.suppress(UserError):
            shape = choose(
                parts.config, count, "train", quantize=None if parts.source is None else parts.source.quantize
            )
            if _bytes(parts, abstract_mesh(shape, "train")) <= room:
                where = "" if count == present else f" of {count} devices"
                return f"try mesh = '{shape}'{where}, or {less}"
        count *= 2
    return less


def some_of(source: Source | None) -> str:
    """Digest of a few numbers of every parameter, by which to know other weights; empty for random ones."""
    if source is None:
        return ""
    some = []
    for path, spec in param_table(source.config, source.quantize if source.stored else None).items():
        if 0 not in spec.shape:
            block = (*(slice(0, 1) for _ in spec.shape[1:]), slice(0, min(spec.shape[-1], 64)))
            some.append(source.read(path, spec, block, np.dtype(spec.dtype or np.float32)).tobytes())
    return digest(some)


def _read(source: Source, places: Mapping[str, Any], dtype: str, path: str, spec: ParamSpec) -> jax.Array:
    """A parameter of a model that is trained, or trained beside, where it is to lie."""
    kind = np.dtype(jnp.dtype(spec.dtype or dtype))
    if 0 in spec.shape:
        return jnp.zeros(spec.shape, kind, device=places[path])
    return place(lambda block: source.read(path, spec, block, kind), spec.shape, kind, places[path])


def fresh(parts: Parts) -> TrainState:
    """The state before the first step, each array made where it lies. Raises `UserError`."""
    config, lora = parts.config, parts.lora
    places = jax.tree.map(lambda x: x.sharding, parts.shapes)
    known, lies = None, flatten(places.model)
    if lora is not None and parts.adapter is not None:
        known = parts.adapter.factors(lora, config, lies)
    elif lora is None and parts.source is not None:
        known = build(config, functools.partial(_read, parts.source, lies, "float32"))
    if known is not None:
        start = functools.partial(init_state, optimizer=parts.optimizer)
        return jax.jit(start, out_shardings=places)(known)

    def random(key: jax.Array) -> TrainState:
        return init_state((init_params if lora is None else lora.init)(config, key), parts.optimizer)

    return jax.jit(random, out_shardings=places)(jax.random.key(parts.settings.seed))
