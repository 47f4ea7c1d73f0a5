"""The run: reads settings, steps until the end, goes on where a run that was killed left off."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1jax.config import M1Config
from m1jax.distributed import check_same, gathered, wait
from m1jax.errors import UserError
from m1jax.loading import Source, open_parameters
from m1jax.model import M1, abstract, build, init_params
from m1jax.params import ParamSpec, flatten, param_table
from m1jax.saving import save
from m1jax.sharding import sizes
from m1jax.sharding.mesh import MeshShape, make_mesh, parsed_mesh
from m1jax.sharding.placing import place
from m1jax.sharding.region import everywhere
from m1jax.sharding.rules import check, rules_of, shardings, shards
from m1jax.stack import positions
from m1jax.tokenizer import Tokenizer
from m1jax.train import data, saving
from m1jax.train.documents import Documents, digest
from m1jax.train.encoder import Encoder, fingerprint
from m1jax.train.interruption import Interruption
from m1jax.train.loss import Balance
from m1jax.train.report import Report
from m1jax.train.settings import Settings
from m1jax.train.step import (
    TrainState,
    accumulated,
    adamw,
    computing,
    cross_entropy,
    init_state,
    make_step,
    measuring,
    schedule,
)
from m1jax.workplace import LOCK, alone, disk_errors

MODEL = "model"  # the trained model's folder in `out`
CHECKED = "data.checked"  # a file there that says which data needs no second look
COMPILED = 3  # steps after the first, then all is compiled
PROFILED = 3  # steps in a trace


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of before its first step; of the weights there are shapes and places only."""

    settings: Settings
    config: M1Config
    tokenizer: Tokenizer | None
    mesh: Mesh
    optimizer: Any
    source: Source | None  # of the weights; None: random ones
    shapes: TrainState
    updates: int  # of the weights, in a step


class Stage(Protocol):
    """What pretraining, SFT and RL differ in.

    Attributes:
      identity: what a run cannot change when it goes on, beside the model; JSON.
      judged_by: the figure that every evaluation has.
    """

    identity: Mapping[str, Any]
    judged_by: str

    def position(self) -> Mapping[str, Any]:
        """Where the data stands, as far as this process reads it, JSON."""
        ...

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Goes on from a position: what all processes knew."""
        ...

    def step(self, state: TrainState, number: int, report: Report) -> TrainState:
        """Does and reports step number `number`, 0 for the first. Raises `Stopped` where the guard says so."""
        ...

    def evaluates(self, number: int) -> bool:
        """Whether the model is evaluated after this step."""
        ...

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        """Figures of an evaluation, `judged_by` among them."""
        ...

    def close(self) -> None:
        """Lets go of the data."""
        ...


class Stopped(UserError):
    """The guard stops the run.

    Attributes:
      state: that before the step, to be gone on from; None if it is gone.
    """

    state: TrainState | None = None


def prepare(settings: Settings, updates: int = 1) -> Parts:
    """Model, tokenizer, mesh and optimiser of a run of so many updates a step, no weights. Raises `UserError`."""
    config = M1Config.from_file(Path(settings.model.path or settings.model.config))
    folder = settings.model.tokenizer or settings.model.path
    tokenizer = Tokenizer.load(folder) if folder and _has_tokenizer(Path(folder), settings) else None
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size}")
    source = open_parameters(Path(settings.model.path)) if settings.model.path else None
    if source is not None and source.quantize is not None:
        raise UserError(f"{settings.model.path} is quantised to {source.quantize}: train the model it came from")
    mesh = mesh_of(settings.mesh, config)
    optimizer = adamw(config, settings.optimizer, settings.steps * updates)
    start = functools.partial(init_state, optimizer=optimizer)
    shapes = jax.eval_shape(start, abstract(config, "float32"))
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings(config, mesh, shapes)
    )
    _require_room(settings.model.path or settings.model.config, shapes, mesh)
    return Parts(settings, config, tokenizer, mesh, optimizer, source, shapes, updates)


def _has_tokenizer(folder: Path, settings: Settings) -> bool:
    return bool(settings.model.tokenizer) or any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def mesh_of(text: str, config: M1Config) -> Mesh:
    """The mesh of a setting such as "data=2,expert=4" or "auto"; one device if it is empty. Raises `UserError`."""
    if not text and jax.process_count() > 1:
        raise UserError(f"mesh is missing: {jax.process_count()} processes share a run by one, such as mesh = 'fsdp=8'")
    mesh = parsed_mesh(text, config, "train") if text else make_mesh(MeshShape(), "train", jax.devices()[:1])
    check(config, mesh)
    return mesh


def _require_room(name: str, shapes: TrainState, mesh: Mesh) -> None:
    """Raises `UserError` if weights and moments do not fit into the free memory of this process's devices."""
    each = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    devices = mesh.local_devices
    on_host = devices[0].platform == "cpu"  # all devices share the host's memory
    needed = each * len(devices) if on_host else each
    free = sizes.free_memory(devices)
    if needed > free:
        raise UserError(
            f"{name} needs {needed / 1e9:.1f} GB of memory on {'this machine' if on_host else 'each device'} for "
            f"weights and moments in float32, {free / 1e9:.1f} GB are free: split it over more "
            f"{'machines' if on_host else 'devices'}, such as mesh = 'fsdp=8', or train a smaller model"
        )


def _some_of(source: Source | None) -> str:
    """Digest of a few numbers of every parameter, by which to know other weights; empty for random ones."""
    if source is None:
        return ""
    some = []
    for path, spec in param_table(source.config).items():
        if 0 not in spec.shape:
            block = (*(slice(0, 1) for _ in spec.shape[1:]), slice(0, min(spec.shape[-1], 64)))
            some.append(source.read(path, spec, block, np.dtype(np.float32)).tobytes())
    return digest(some)


def fresh(parts: Parts) -> TrainState:
    """The state before the first step, each array made where it lies. Raises `UserError`."""
    config, source = parts.config, parts.source
    places = jax.tree.map(lambda x: x.sharding, parts.shapes)
    if source is not None:
        lies = flatten(places.model)

        def leaf(path: str, spec: ParamSpec) -> jax.Array:
            if 0 in spec.shape:
                return jnp.zeros(spec.shape, jnp.float32, device=lies[path])
            kind = np.dtype(np.float32)
            return place(lambda block: source.read(path, spec, block, kind), spec.shape, kind, lies[path])

        start = functools.partial(init_state, optimizer=parts.optimizer)
        return jax.jit(start, out_shardings=places)(build(config, leaf))

    def random(key: jax.Array) -> TrainState:
        return init_state(init_params(config, key), parts.optimizer)

    return jax.jit(random, out_shardings=places)(jax.random.key(parts.settings.seed))


def run(settings: Settings, profile: bool = False) -> None:
    """Pretraining or SFT from settings to the trained model.

    Args:
      settings: of the run; `out` holds it. Checkpoints there are gone on from.
      profile: write a trace of three steps to `out/profile`, for TensorBoard or xprof.

    Raises:
      UserError: settings, data, model and checkpoints do not fit; a step was bad and the guard says stop; the disk
        is full at the end.
    """
    parts = prepare(settings)
    drive(parts, Supervised(parts), profile)


def drive(parts: Parts, stage: Stage, profile: bool) -> None:
    """All steps of a stage, from the newest checkpoint to the trained model; arguments and errors as of `run`."""
    settings, out = parts.settings, Path(parts.settings.out)
    with disk_errors(out), contextlib.ExitStack() as stack:
        stack.callback(stage.close)
        out.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            stack.enter_context(alone(out, out / LOCK))
        identity = saving.identity(parts.config, {**stage.identity, "model.weights": _some_of(parts.source)})
        check_same("settings or data", (settings, identity))
        checkpoints = saving.Checkpoints(out, settings.checkpoint.keep, identity)
        if jax.process_count() == 1:  # of several, one that fails ends without waiting for the others
            stack.callback(checkpoints.close)
        state, first = None, checkpoints.latest or 0
        if first > settings.steps:
            raise UserError(f"{out} is at step {first} of its run already: steps = {settings.steps} is less")
        if first:
            state, position = checkpoints.load(parts.shapes)
            stage.go_on(position)
        report = stack.enter_context(Report(settings, parts.config, parts.mesh.size, first))
        if first:
            report.say(f"going on from step {first} of {settings.steps}")
        if settings.optimizer.warmup >= settings.steps * parts.updates:
            report.say(f"warning: optimizer.warmup = {settings.optimizer.warmup} is not over when the run is")
        state = _steps(parts, stage, state or fresh(parts), checkpoints, report, first, profile)
        problem = checkpoints.close()
        if problem:
            raise UserError(f"{problem}: make room, then run again: it goes on from there")
        folder = Path(parts.tokenizer.folder) if parts.tokenizer is not None else None
        save(state.model, out / MODEL, settings.model.save_dtype, folder, overwrite=True)
        report.draw()


def _steps(
    parts: Parts,
    stage: Stage,
    state: TrainState,
    checkpoints: saving.Checkpoints,
    report: Report,
    first: int,
    profile: bool,
) -> TrainState:
    """All steps from number `first`.

    Ctrl-C, SIGTERM and the guard leave a checkpoint of the last good step; the guard not in stage rl, where a batch is
    half learnt by then, and Ctrl-C not with several processes, which would hear it in different steps.
    """
    settings = parts.settings
    traced = profiled(first, settings.steps) if profile else range(0)
    if profile and not traced:
        report.say("warning: no step is left to profile")
    killed_at_evaluation = bool(first) and stage.evaluates(first - 1) and not report.has(stage.judged_by)
    interruption = Interruption()
    with contextlib.ExitStack() as trace, jax.set_mesh(parts.mesh), interruption.held_back():
        if killed_at_evaluation:
            report.add(stage.evaluate(state))
        report.resume()
        for number in range(first, settings.steps):
            if number in traced[:1]:
                jax.profiler.start_trace(str(Path(settings.out) / "profile"))
                trace.callback(jax.profiler.stop_trace)
            position = stage.position()
            try:
                state = stage.step(state, number, report)
            except Stopped as stopped:
                _keep(stopped.state, number, position, checkpoints, report)
                raise
            if number in traced[-1:]:
                trace.close()
            if (number + 1) % settings.checkpoint_every == 0 or number + 1 == settings.steps:
                problem = checkpoints.save(number + 1, state, stage.position())
                if problem:
                    report.say(f"warning: {problem}; training goes on")
            if interruption.ends(number):
                _keep(state, number + 1, stage.position(), checkpoints, report)
                wait("interrupted")  # whoever ends first takes the others along
                raise KeyboardInterrupt
            if stage.evaluates(number):
                report.add(stage.evaluate(state))
            report.resume()
    return state


def _keep(state: TrainState | None, step: int, position: Any, checkpoints: saving.Checkpoints, report: Report) -> None:
    """Writes the checkpoint of a run that ends early, unless it is there already or there is nothing to go on from."""
    problem = checkpoints.wait()
    if state is not None and step > (checkpoints.latest or 0) and _finite(state):
        problem = checkpoints.save(step, state, position) or checkpoints.wait()
    if problem or checkpoints.latest:
        report.say(f"warning: {problem}" if problem else f"the same command goes on from step {checkpoints.latest}")


def _finite(state: TrainState) -> bool:
    def finite(state: TrainState) -> jax.Array:
        return jnp.stack([everywhere(jnp.isfinite(x).all()) for x in jax.tree.leaves(state)]).all()

    return bool(jax.jit(finite)(state))


def profiled(first: int, steps: int) -> range:
    """Which steps are traced: three when all is compiled, or the last ones if fewer are left."""
    begin = max(first, min(first + COMPILED, steps - PROFILED))
    return range(begin, min(begin + PROFILED, steps))


class Supervised:
    """Pretraining and SFT: steps on documents.

    Raises:
      UserError: the data does not fit settings, tokenizer or mesh.
    """

    judged_by = "validation_loss"

    def __init__(self, parts: Parts) -> None:
        self._parts, settings = parts, parts.settings
        d, ways = settings.data, shards(parts.mesh, "batch")
        if d.rows % ways:
            raise UserError(f"data.rows = {d.rows} does not divide among {ways} groups of devices: take a multiple")
        documents = Documents(d.files, d.length, without=d.validation)
        end = _end_token(settings, parts.tokenizer)
        self._encoder = Encoder(parts.tokenizer, d.length, parts.config.vocab_size, end)
        self._validation = Documents(d.validation, d.length, "data.validation") if d.validation else None
        self.identity: Mapping[str, Any] = {
            "data": documents.fingerprint,
            "data.contents": documents.contents,
            "tokenizer": fingerprint(parts.tokenizer),
            "seed": settings.seed,
            "data.bins": d.bins,
            "data.end_token": d.end_token,
            "data.length": d.length,
            "data.rows": d.rows,
            "data.accumulate": d.accumulate,
            "data.streams": d.streams,
        }
        sets = [documents] if self._validation is None else [documents, self._validation]
        self._check(sets, Path(settings.out) / CHECKED)
        place = by_rows(parts.mesh).addressable_devices_indices_map((d.accumulate, d.rows, d.length))
        own = [index[1] for index in place.values() if index is not None]
        self._source = data.Batches(documents, self._encoder, d, settings.seed, own)
        balance = Balance.of(settings.optimizer, parts.config)
        loss = cross_entropy(settings.model.dtype, settings.model.remat, balance, settings.model.capacity or None)
        self._step = make_step(loss, parts.optimizer, settings.guard, settings.optimizer.rates)
        self._measure = measuring(loss)
        self._rate = schedule(settings.optimizer, settings.steps)
        self._guard = Guard(settings, loss)

    def _check(self, sets: Sequence[Documents], note: Path) -> None:
        """Raises `UserError` for a document that is not as it should be, unless a note says that these were checked."""
        check_same("settings or data", (self._parts.settings, self.identity))
        found = digest(([documents.contents for documents in sets], self.identity, self._parts.config.vocab_size))
        noted = note.is_file() and note.read_text(encoding="utf-8") == found
        if all(gathered(noted)):
            return
        for documents in sets:
            data.check(documents, self._encoder)
        if jax.process_index() == 0:
            with disk_errors(note):
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(found, encoding="utf-8")

    def position(self) -> Mapping[str, Any]:
        """Where the data stands."""
        return self._source.get_state()

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Goes on from a position."""
        self._source.set_state(position)

    def step(self, state: TrainState, number: int, report: Report) -> TrainState:
        """Does and reports one update."""
        batch = to_devices(next(self._source), self._parts.mesh)
        rate = float(np.asarray(self._rate(int(state.accepted))))
        state, metrics = self._step(state, batch)
        values = figures(fetched(metrics))
        report.step(number, values | {"learning_rate": rate}, *size(batch))
        try:
            self._guard.look(number, state, batch, values, report)
        except Stopped as stopped:
            stopped.state = dataclasses.replace(state, step=state.step - 1)  # a bad step changes nothing else
            raise
        return state

    def evaluates(self, number: int) -> bool:
        """Whether the validation files are read after this step: every so many, and at the end."""
        settings = self._parts.settings
        last = number + 1 == settings.steps
        return self._validation is not None and ((number + 1) % settings.data.validate_every == 0 or last)

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        """The cross-entropy of all tokens of the validation files."""
        assert self._validation is not None
        total = weight = 0.0
        for rows in data.one_pass(self._validation, self._encoder, self._parts.settings.data):
            found = fetched(self._measure(state.model, to_devices(rows, self._parts.mesh)))
            total += float(found["cross_entropy"]) * float(found["weights"])
            weight += float(found["weights"])
        return {self.judged_by: total / max(weight, 1e-9)}

    def close(self) -> None:
        """Lets go of the data."""
        self._source.close()


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


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch `[A, rows, T]`, of which every process has the rows of its devices, as arrays of the mesh."""
    place = by_rows(mesh)
    return {name: jax.make_array_from_callback(x.shape, place, x.__getitem__) for name, x in batch.items()}


def by_rows(mesh: Mesh) -> NamedSharding:
    """Where the arrays of a batch `[A, B, T]` lie."""
    axes = tuple(axis for axis in rules_of(mesh)["batch"] if mesh.shape[axis] > 1)
    return NamedSharding(mesh, PartitionSpec(None, axes or None))


def fetched(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metrics of a step on the host, the same in every process; to be called in `jax.set_mesh`."""
    return jax.device_get({name: x if x.is_fully_addressable else everywhere(x) for name, x in metrics.items()})


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


def size(batch: Mapping[str, jax.Array]) -> tuple[int, float]:
    """Tokens of a batch, and the mean number of tokens that a query sees in its segment."""
    found = fetched(_size(batch["segments"]))
    return int(found["tokens"]), float(found["seen"] / max(found["tokens"], 1))


@jax.jit
def _size(segments: jax.Array) -> dict[str, jax.Array]:
    valid = segments > 0
    seen = positions(segments.reshape(-1, segments.shape[-1])).reshape(segments.shape) + 1
    return {"tokens": jnp.sum(valid), "seen": jnp.sum(jnp.where(valid, seen, 0).astype(jnp.float32))}


class Guard:
    """Says what was wrong with a step that changed nothing, and stops the run if it should."""

    def __init__(self, settings: Settings, loss: Any) -> None:
        self._settings, self._loss = settings, loss
        self._bad = 0

    def look(self, number: int, state: TrainState, batch: Any, values: Mapping[str, Any], report: Report) -> None:
        """Raises `Stopped` after a bad step if the guard says stop, or after too many."""
        if values["good"]:
            self._bad = 0
            return
        self._bad += 1
        guard = self._settings.guard
        what = f"step {number + 1}: {self._what(state, batch, values)}; the weights are as before"
        if guard.action == "stop":
            raise Stopped(f'{what}: look at the data or lower the learning rate, or set guard.action = "skip"')
        report.say(f"warning: {what}, the step is skipped")
        if self._bad >= guard.skips:
            raise Stopped(f"{what}; that was the {self._bad}th in a row: look at the data or the learning rate")

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

    def bad_parts(model: M1, batch: Any) -> Any:
        gradient, _ = accumulated(loss, model, batch)
        return jax.tree.map(lambda x: everywhere(~jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))), gradient)

    found = []
    for path, bad in flatten(jax.device_get(jax.jit(bad_parts)(model, batch))).items():
        if bad.any():
            found.append(f"{path}[{int(bad.argmax())}]" if "." in path else path)
    return ", ".join(found[:4]) or "the loss alone"
