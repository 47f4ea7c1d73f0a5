"""Stage `rl` of `python -m m1jax.train`: steps of `m1jax.rl.learner`, with the trainer's checkpoints and report."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from m1jax.errors import UserError
from m1jax.evaluate import eos_ids
from m1jax.prompt import Prompter
from m1jax.rl.learner import Learner
from m1jax.rl.policy import policy_gradient
from m1jax.rl.settings import RLSettings
from m1jax.sharding.rules import shards
from m1jax.train import saving
from m1jax.train.loop import MODEL, PROFILED, Guard, Parts, by_rows, figures, prepare
from m1jax.train.report import Report
from m1jax.train.settings import Settings, parse
from m1jax.train.step import TrainState, make_step
from m1jax.workplace import disk_errors


def run(settings: Settings, profile: bool = False) -> None:
    """Reinforcement learning from settings to the trained model; checkpoints in `out` are gone on from.

    Args:
      settings: of the run; `steps` counts generation batches, the schedule of the optimizer its updates.
      profile: write a trace of three steps to `out/profile`.

    Raises:
      UserError: settings, model and checkpoints do not fit, a step was bad and the guard says stop, or the disk is
        full at the end.
    """
    rl = parse(RLSettings, settings.rl, "rl.")
    if not settings.model.path:
        raise UserError("model.path is missing: stage rl goes on from a trained model")
    out = Path(settings.out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    # Gradients of RL are 1e-18 to 1e-5: a larger eps would drown them.
    optimizer = dataclasses.replace(settings.optimizer, eps=settings.optimizer.eps or 1e-15)
    parts = prepare(dataclasses.replace(settings, optimizer=optimizer, steps=settings.steps * rl.updates))
    if parts.tokenizer is None:
        raise UserError(f"{settings.model.path} has no tokenizer: add its files, or set model.tokenizer")
    identity = saving.identity(parts.config, _fingerprint(settings, rl), rl.row_tokens, rl.questions, rl.updates)
    with contextlib.ExitStack() as stack:
        checkpoints = saving.Checkpoints(out, settings.checkpoint.keep, identity)
        stack.callback(checkpoints.close)
        state, first = parts.state, 0
        if checkpoints.latest is not None:
            first = checkpoints.latest
            state, _ = checkpoints.load(state)
        report = stack.enter_context(Report(settings, parts.config, first))
        if first:
            report.say(f"going on from step {first} of {settings.steps}")
        with disk_errors(out), jax.set_mesh(parts.mesh):
            state = _steps(settings, rl, parts, state, checkpoints, report, first, profile)
        report.draw()
        problem = checkpoints.close()
        if problem:
            raise UserError(f"{problem}: make room, then run again: it goes on from there")
    saving.write_model(state.model, out / MODEL, Path(parts.tokenizer.folder), settings.model.dtype)


def _fingerprint(settings: Settings, rl: RLSettings) -> str:
    """What the problems and the loss depend on."""
    return hashlib.sha256(repr((settings.seed, rl)).encode()).hexdigest()[:16]


def _steps(
    settings: Settings,
    rl: RLSettings,
    parts: Parts,
    state: TrainState,
    checkpoints: saving.Checkpoints,
    report: Report,
    first: int,
    profile: bool,
) -> TrainState:
    """All steps from number `first`."""
    assert parts.tokenizer is not None
    balance = settings.optimizer.balance if settings.optimizer.balance >= 0 else parts.config.router_aux_loss_coef
    loss = policy_gradient(rl, settings.model.dtype, settings.model.remat, balance)
    step, guard, current = make_step(loss, parts.optimizer, settings.guard), Guard(settings, loss), first

    def update(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Mapping[str, Any]]:
        arrays = jax.device_put(dict(batch), by_rows(parts.mesh))
        state, metrics = step(state, arrays)
        values = jax.device_get(metrics)
        guard.look(current, state, arrays, values, report)
        return state, figures(values)

    prompter = Prompter(parts.tokenizer)
    eos = eos_ids(parts.config, parts.tokenizer)
    learner = Learner(
        rl,
        prompter,
        eos,
        settings.model.dtype,
        settings.seed,
        settings.steps,
        update,
        settings.data.accumulate,
        shards(parts.mesh, "batch"),
    )
    for current in range(first, settings.steps):
        if profile and current - first in (PROFILED[0], PROFILED[-1] + 1):
            begin = current - first == PROFILED[0]
            jax.profiler.start_trace(str(Path(settings.out) / "profile")) if begin else jax.profiler.stop_trace()
        state, values = learner.step(state, current)
        last = current + 1 == settings.steps
        if rl.evaluate_every and ((current + 1) % rl.evaluate_every == 0 or last):
            values |= learner.evaluate(state.model)
        report.step(current, values, int(values.pop("tokens")), float(values["reply_tokens"]))
        if (current + 1) % settings.checkpoint.every == 0 or last:
            problem = checkpoints.save(current + 1, state, {"step": current + 1})
            if problem:
                report.say(f"warning: {problem}; training goes on")
    return state
