"""The run: reads settings, steps until the end, goes on where a run that was killed left off."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.loading import open_parameters
from m1jax.model import M1, build, init_params
from m1jax.params import ParamSpec, flatten
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.rules import check, rules_of, shardings, shards
from m1jax.tokenizer import Tokenizer
from m1jax.train import data, saving
from m1jax.train.report import Report
from m1jax.train.settings import Settings
from m1jax.train.step import TrainState, accumulated, adamw, computing, cross_entropy, init_state, make_step, schedule
from m1jax.workplace import disk_errors

MODEL = "model"  # the trained model's folder in `out`
PROFILED = range(3, 6)  # steps after the first, when all is compiled


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of before its first step."""

    settings: Settings
    config: M1Config
    tokenizer: Tokenizer | None
    mesh: Mesh
    state: TrainState
    optimizer: Any


def prepare(settings: Settings) -> Parts:
    """Model, tokenizer, mesh and optimiser of a run. Raises `UserError`."""
    config = M1Config.from_file(Path(settings.model.path or settings.model.config))
    folder = settings.model.tokenizer or settings.model.path
    tokenizer = Tokenizer.load(folder) if folder and _has_tokenizer(Path(folder), settings) else None
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size}")
    mesh = mesh_of(settings.mesh, config)
    optimizer = adamw(config, settings.optimizer, settings.steps)
    return Parts(settings, config, tokenizer, mesh, _fresh(settings, config, mesh, optimizer), optimizer)


def _has_tokenizer(folder: Path, settings: Settings) -> bool:
    return bool(settings.model.tokenizer) or any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def mesh_of(text: str, config: M1Config) -> Mesh:
    """The mesh of a setting such as "data=2,expert=4"; one device if it is empty. Raises `UserError`."""
    shape = MeshShape.parse(text) if text else MeshShape()
    mesh = make_mesh(shape, "train", jax.devices() if text else jax.devices()[:1])
    check(config, mesh)
    return mesh


def _fresh(settings: Settings, config: M1Config, mesh: Mesh, optimizer: Any) -> TrainState:
    """The state before the first step, each array made where it lies."""
    if settings.model.path:
        source = open_parameters(Path(settings.model.path))
        if source.quantize is not None:
            raise UserError(f"{settings.model.path} is quantised to {source.quantize}: train the model it came from")
        abstract = build(config, lambda _, spec: jax.ShapeDtypeStruct(spec.shape, np.float32))
        places = flatten(shardings(config, mesh, abstract))

        def leaf(path: str, spec: ParamSpec) -> jax.Array:
            if 0 in spec.shape:
                return jnp.zeros(spec.shape, jnp.float32)
            kind = np.dtype(np.float32)
            return jax.make_array_from_callback(
                spec.shape, places[path], lambda block: source.read(path, spec, block or (), kind)
            )

        model = build(config, leaf)
        start = functools.partial(init_state, optimizer=optimizer)
        return jax.jit(start, out_shardings=shardings(config, mesh, jax.eval_shape(start, model)))(model)

    def random(key: jax.Array) -> TrainState:
        return init_state(init_params(config, key), optimizer)

    key = jax.random.key(settings.seed)
    return jax.jit(random, out_shardings=shardings(config, mesh, jax.eval_shape(random, key)))(key)


def run(settings: Settings, profile: bool = False) -> None:
    """Pretraining or SFT from settings to the trained model.

    Args:
      settings: of the run; `out` holds it. Checkpoints there are gone on from.
      profile: write a trace of three steps to `out/profile`, for TensorBoard or xprof.

    Raises:
      UserError: settings, data, model and checkpoints do not fit; a step was bad and the guard says stop; the disk
        is full at the end.
    """
    out = Path(settings.out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    parts = prepare(settings)
    documents = data.Documents(settings.data.files, settings.data.length)
    end = _end_token(settings, parts.tokenizer)
    encoder = data.Encoder(parts.tokenizer, settings.data.length, parts.config.vocab_size, end)
    d = settings.data
    identity = saving.identity(parts.config, documents.fingerprint, d.length, d.rows, d.accumulate)
    with contextlib.ExitStack() as stack:
        processes = jax.process_index(), jax.process_count()
        source = data.batches(documents, encoder, d, settings.seed, *processes)
        stack.callback(source.close)
        checkpoints = saving.Checkpoints(out, settings.checkpoint.keep, identity)
        stack.callback(checkpoints.close)
        state, first = parts.state, 0
        if checkpoints.latest is not None:
            first = checkpoints.latest
            state, position = checkpoints.load(state)
            source.set_state(position)
        report = stack.enter_context(Report(settings, parts.config, first))
        if first:
            report.say(f"going on from step {first} of {settings.steps}")
        with disk_errors(out):
            state = _steps(parts, state, source, checkpoints, report, first, profile)
        report.draw()
        problem = checkpoints.close()
        if problem:
            raise UserError(f"{problem}: make room, then run again: it goes on from there")
    folder = Path(parts.tokenizer.folder) if parts.tokenizer is not None else None
    saving.write_model(state.model, out / MODEL, folder, settings.model.dtype)


def _end_token(settings: Settings, tokenizer: Tokenizer | None) -> int | None:
    """Id of the token after each document."""
    name = settings.data.end_token
    if tokenizer is None:
        return None
    name = name or tokenizer.special.get("eos_token", "")
    index = tokenizer.id_of(name) if name else None
    if name and index is None:
        raise UserError(f"data.end_token {name!r} is no token of {tokenizer.folder}")
    return index


def _steps(
    parts: Parts,
    state: TrainState,
    source: Any,
    checkpoints: saving.Checkpoints,
    report: Report,
    first: int,
    profile: bool,
) -> TrainState:
    """All steps from number `first`."""
    settings, config, mesh = parts.settings, parts.config, parts.mesh
    balance = settings.optimizer.balance if settings.optimizer.balance >= 0 else config.router_aux_loss_coef
    loss = cross_entropy(settings.model.dtype, settings.model.remat, balance, settings.model.capacity or None)
    step = make_step(loss, parts.optimizer, settings.guard)
    rate = schedule(settings.optimizer, settings.steps)
    guard = Guard(settings, loss)
    with jax.set_mesh(mesh):
        for number in range(first, settings.steps):
            if profile and number - first in (PROFILED[0], PROFILED[-1] + 1):
                _profile(Path(settings.out) / "profile", begin=number - first == PROFILED[0])
            local = next(source)
            batch = to_devices(local, mesh)
            lr = float(np.asarray(rate(int(state.accepted))))
            state, metrics = step(state, batch)
            values = jax.device_get(metrics)
            values = {**figures(values), "learning_rate": lr}
            report.step(number, values, *_size(local))
            guard.look(number, state, batch, values, report)
            if (number + 1) % settings.checkpoint.every == 0 or number + 1 == settings.steps:
                problem = checkpoints.save(number + 1, state, source.get_state())
                if problem:
                    report.say(f"warning: {problem}; training goes on")
        if profile and settings.steps - first > PROFILED[0] and settings.steps - first <= PROFILED[-1] + 1:
            _profile(Path(settings.out) / "profile", begin=False)
    return state


def _profile(folder: Path, begin: bool) -> None:
    jax.profiler.start_trace(str(folder)) if begin else jax.profiler.stop_trace()


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's part of a batch `[A, rows, T]` as arrays of the mesh, split by rows. Raises `UserError`."""
    ways = shards(mesh, "batch")
    rows = next(iter(batch.values())).shape[1] * jax.process_count()
    if rows % ways:
        raise UserError(f"data.rows = {rows} does not divide among {ways} groups of devices: take a multiple")
    place = by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(place, x) for name, x in batch.items()}


def by_rows(mesh: Mesh) -> NamedSharding:
    """Where the arrays of a batch `[A, B, T]` lie."""
    axes = tuple(axis for axis in rules_of(mesh)["batch"] if mesh.shape[axis] > 1)
    return NamedSharding(mesh, PartitionSpec(None, axes or None))


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a step for the report; the load of the experts becomes shares and their extremes."""
    out = {name: value for name, value in metrics.items() if name not in ("load", "limit")}
    if "load" in metrics:
        load = np.asarray(metrics["load"], np.float64)
        share = load / max(load[0].sum(), 1.0) * load.shape[1]  # 1 where all experts are used alike
        out |= {
            "load": share,
            "load_max": float(share.max()),
            "load_min": float(share.min()),
            "dropped": float(metrics.get("dropped", 0.0)),  # without a capacity every token reaches its experts
            "router_entropy_mean": float(np.mean(metrics["router_entropy"])),
        }
    return out


def _size(batch: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens of a batch on all processes, and the mean number of tokens that a query sees in its segment."""
    segments = batch["segments"].reshape(-1, batch["segments"].shape[-1])
    start = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    seen = index - np.maximum.accumulate(np.where(start, index, 0), axis=1) + 1
    valid = segments > 0
    return int(valid.sum()) * jax.process_count(), float(seen[valid].mean()) if valid.any() else 0.0


class Guard:
    """Says what was wrong with a step that changed nothing, and stops the run if it should."""

    def __init__(self, settings: Settings, loss: Any) -> None:
        self._settings, self._loss = settings, loss
        self._bad = 0

    def look(self, number: int, state: TrainState, batch: Any, values: Mapping[str, Any], report: Report) -> None:
        """Raises `UserError` after a bad step if the guard says stop, or after too many."""
        if values["good"]:
            self._bad = 0
            return
        self._bad += 1
        guard = self._settings.guard
        what = f"step {number + 1}: {self._what(state, batch, values)}; the weights are as before"
        if guard.action == "stop":
            raise UserError(f'{what}: look at the data or lower the learning rate, or set guard.action = "skip"')
        report.say(f"warning: {what}, the step is skipped")
        if self._bad >= guard.skips:
            raise UserError(f"{what}; that was the {self._bad}th in a row: look at the data or the learning rate")

    def _what(self, state: TrainState, batch: Any, values: Mapping[str, Any]) -> str:
        if np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"]):
            return f"the loss {values['loss']:.4f} is a spike"
        model = computing(state.model, self._settings.model.dtype)
        for i in range(batch["tokens"].shape[0]):
            place = model.first_bad_layer(batch["tokens"][i], batch["segments"][i])
            if place is not None:
                return f"NaN or infinity first appears in {place}"
        return f"the gradient is not finite in {bad_gradients(self._loss, state.model, batch)}"


def bad_gradients(loss: Any, model: M1, batch: Any) -> str:
    """Names of the parameters whose gradient is not finite, with the first layer of each."""
    gradient, _ = jax.jit(functools.partial(accumulated, loss))(model, batch)
    found = []
    for path, leaf in flatten(gradient).items():
        bad = ~np.isfinite(np.asarray(leaf)).reshape(leaf.shape[0], -1).all(axis=1)
        if bad.any():
            found.append(f"{path}[{int(bad.argmax())}]" if "." in path else path)
    return ", ".join(found[:4]) or "the loss alone"
