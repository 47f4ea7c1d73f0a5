"""The run of any stage: steps until the end, goes on where a run that was killed left off."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1jax.distributed import check_same, wait
from m1jax.errors import UserError
from m1jax.lora.adapter import digest as adapter_digest
from m1jax.lora.adapter import save_adapter
from m1jax.saving import save
from m1jax.sharding.region import everywhere
from m1jax.sharding.rules import rules_of
from m1jax.train import saving
from m1jax.train.guard import Stopped
from m1jax.train.interruption import Interruption
from m1jax.train.parts import Parts, fresh, some_of
from m1jax.train.report import Report
from m1jax.train.settings import Settings
from m1jax.train.step import TrainState
from m1jax.workplace import LOCK, alone, check_folder, disk_errors

MODEL, ADAPTER = "model", "adapter"  # folders in `out` for what was trained
COMPILED = 3  # steps after the first, then all is compiled
PROFILED = 3  # steps in a trace


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


def drive(parts: Parts, stage: Stage, profile: bool) -> None:
    """All steps of a stage from the newest checkpoint to the trained model, as `supervised.run` of its own."""
    settings, out = parts.settings, Path(parts.settings.out)
    with disk_errors(out), contextlib.ExitStack() as stack:
        stack.callback(stage.close)
        out.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            stack.enter_context(alone(out, out / LOCK))
        own = {"model.weights": some_of(parts.source), "lora": parts.beside}
        identity = saving.identity(parts.config, {**stage.identity, **own})
        begun = None if parts.adapter is None else adapter_digest(parts.adapter.folder)
        check_same("settings or data", (settings, identity, begun))
        checkpoints = saving.Checkpoints(out, settings.checkpoint.keep, identity)
        if jax.process_count() == 1:  # of several, one that fails ends without waiting for the others
            stack.callback(checkpoints.close)
        state, first = None, checkpoints.latest or 0
        place = out / (MODEL if parts.lora is None else ADAPTER)
        _check_place(settings, place, first)
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
            where = "begins anew" if checkpoints.latest is None else "goes on from there"
            raise UserError(f"{problem}: make room, then run again: it {where}")
        if parts.lora is not None:
            save_adapter(state.model, place, parts.lora, parts.config, settings.model.path)
        else:
            folder = Path(parts.tokenizer.folder) if parts.tokenizer is not None else None
            save(parts.model(state), place, settings.model.save_dtype, folder, overwrite=True)
        report.draw()


def _check_place(settings: Settings, place: Path, first: int) -> None:
    """Raises `UserError` if the trained model would take the place of what this run, at step `first`, has not made."""
    for begins in (settings.model.path, settings.model.tokenizer, settings.lora.path):
        if begins and Path(begins).resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"{place} is where the trained model goes, and {begins} what it begins with: choose another out"
            )
    check_folder(
        place, overwrite=first > 0, remedy="move it or choose another out, no checkpoint says it is this run's"
    )


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

    def end(number: int) -> None:
        _keep(state, number + 1, stage.position(), checkpoints, report)
        wait("interrupted")  # whoever ends first takes the others along
        raise KeyboardInterrupt

    def evaluate(number: int) -> None:
        report.add(stage.evaluate(state))
        if jax.process_count() == 1 and interruption.ends(number):  # several are asked once after each step
            end(number)

    with contextlib.ExitStack() as trace, jax.set_mesh(parts.mesh), interruption.held_back():
        if killed_at_evaluation:
            evaluate(first - 1)
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
                end(number)
            if stage.evaluates(number):
                evaluate(number)
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
    out = {name: value for name, value in metrics.items() if name not in ("load", "loss_limit", "tokens", "seen")}
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


def size(metrics: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens of a step, and the mean number of tokens that a query sees in its segment, of the step's metrics."""
    return int(metrics["tokens"]), float(metrics["seen"] / max(metrics["tokens"], 1))
