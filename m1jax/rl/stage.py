"""Stage `rl` of `python -m m1jax.train`: steps of `m1jax.rl.learner`, with the trainer's checkpoints and report."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.errors import UserError
from m1jax.evaluate import eos_ids
from m1jax.prompt import Prompter
from m1jax.rl.learner import Learner
from m1jax.rl.policy import policy_gradient
from m1jax.rl.settings import RLSettings
from m1jax.sharding.rules import shards
from m1jax.train.documents import digest
from m1jax.train.encoder import fingerprint
from m1jax.train.guard import Guard
from m1jax.train.loop import drive, fetched, figures, size, to_devices
from m1jax.train.loss import Balance
from m1jax.train.parts import Parts, prepare
from m1jax.train.report import Report
from m1jax.train.settings import Settings, parse
from m1jax.train.step import TrainState, make_step, measuring, schedule

# What may be changed when a run goes on: how long a batch may take, not what is asked and learnt.
CHANGEABLE = ("row_tokens", "attempts", "evaluate_every", "evaluate_problems")


def run(settings: Settings, profile: bool = False) -> None:
    """Reinforcement learning from settings to the trained model; checkpoints in `out` are gone on from.

    Args:
      settings: of the run; `steps` counts generation batches, the schedule of the optimizer the updates planned.
      profile: write a trace of three steps to `out/profile`.

    Raises:
      UserError: settings, model and checkpoints do not fit, a step was bad and the guard says stop, or the disk is
        full at the end.
    """
    rl = parse(RLSettings, settings.rl, "rl.")
    if not settings.model.path:
        raise UserError("model.path is missing: stage rl goes on from a trained model")
    # Gradients of RL are 1e-18 to 1e-5: a larger eps would drown them.
    optimizer = dataclasses.replace(settings.optimizer, eps=settings.optimizer.eps or 1e-15)
    parts = prepare(dataclasses.replace(settings, optimizer=optimizer), rl.updates)
    drive(parts, Reinforced(parts, rl), profile)


class Reinforced:
    """Steps of `Learner`, each a generation batch and its updates.

    Raises:
      UserError: the settings do not fit tokenizer, model or mesh, or there is no such task.
    """

    judged_by = "held_out"

    def __init__(self, parts: Parts, rl: RLSettings) -> None:
        settings = parts.settings
        if parts.tokenizer is None:
            raise UserError(f"{settings.model.path} has no tokenizer: add its files, or set model.tokenizer")
        self._parts, self._rl = parts, rl
        balance = Balance.of(settings.optimizer, parts.config)
        dtype, remat = settings.model.dtype, settings.model.remat
        loss = policy_gradient(rl.policy_loss, rl.temperature, dtype, remat, balance, rl.recurs(dtype))
        self._step = make_step(loss, parts.optimizer, settings.guard, settings.optimizer.rates)
        self._measure = measuring(loss)
        self._rate = schedule(settings.optimizer, settings.steps * rl.updates)
        self._guard = Guard(parts, loss)
        self._idle = 0  # batches from which nothing was learnt
        self._learner = Learner(
            rl,
            Prompter(parts.tokenizer),
            eos_ids(parts.config, parts.tokenizer),
            settings.model.dtype,
            settings.seed,
            settings.steps,
            settings.data.accumulate,
            shards(parts.mesh, "batch"),
        )
        self._learner.check_problems(parts.config.max_position_embeddings)
        own = {name: value for name, value in dataclasses.asdict(rl).items() if name not in CHANGEABLE}
        self.identity: Mapping[str, Any] = {
            "seed": settings.seed,
            "tokenizer": fingerprint(parts.tokenizer),
            "rl.own_tasks": [digest(Path(task.file).read_bytes()) for task in self._learner.tasks if task.file],
            **{f"rl.{name}": own[name] for name in own},
            "rl.recurrent": rl.recurs(settings.model.dtype),  # what it comes to on these devices
        }

    def position(self) -> Mapping[str, Any]:
        """Nothing: all randomness follows from the step's number."""
        return {}

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Does nothing: see `position`."""

    def step(self, state: TrainState, number: int, report: Report) -> TrainState:
        """Does and reports one generation batch and its updates; the learning rate is that of the first."""
        sizes: list[tuple[int, float]] = []
        places: list[int] = []  # of the updates in the schedule

        def update(state: TrainState, batch: Mapping[str, Any], at: int) -> tuple[TrainState, Mapping[str, Any]]:
            arrays = to_devices(batch, self._parts.mesh)
            places.append(at)
            state, metrics = self._step(state, arrays, at, self._parts.base)
            values = fetched(metrics)
            sizes.append(size(values))
            self._guard.look(number, state, arrays, values, report)
            return state, figures(values)

        def measure(state: TrainState, batch: Mapping[str, Any]) -> Mapping[str, Any]:
            return fetched(self._measure(self._parts.model(state), to_devices(batch, self._parts.mesh)))

        state, values = self._learner.step(self._parts.model(state), state, number, update, measure)
        tokens = sum(count for count, _ in sizes)
        context = sum(count * seen for count, seen in sizes) / max(tokens, 1)
        rate = float(np.asarray(self._rate(places[0] if places else number * self._rl.updates)))
        report.step(number, values | {"learning_rate": rate}, tokens, context, values["rollout_seconds"])
        if not values["updates"]:
            self._idle += 1
            if self._idle & (self._idle - 1) == 0:  # the first, the second, the fourth …
                report.say(
                    f"warning: step {number + 1} taught nothing, {self._idle} of this start's so far: all replies to "
                    "each question were right, or all wrong; change rl.difficulty, or raise rl.attempts or rl.replies"
                )
        return state

    def evaluates(self, number: int) -> bool:
        """Whether the model is evaluated after this step: every so many, and at the end."""
        every, last = self._rl.evaluate_every, number + 1 == self._parts.settings.steps
        return bool(every) and ((number + 1) % every == 0 or last)

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        """Accuracy on held-out problems."""
        return self._learner.evaluate(self._parts.model(state))

    def close(self) -> None:
        """Does nothing: no file is open."""
