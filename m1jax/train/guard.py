"""What becomes of a run after a bad step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.errors import UserError
from m1jax.lora.factors import Base
from m1jax.params import flatten
from m1jax.sharding.region import everywhere
from m1jax.train.parts import Parts
from m1jax.train.report import Report
from m1jax.train.step import Trained, TrainState, accumulated, beside, computing


class Stopped(UserError):
    """The guard stops the run.

    Attributes:
      state: that before the step, to be gone on from; None if it is gone.
    """

    state: TrainState | None = None


class Guard:
    """Says what was wrong with a step that changed nothing, and stops the run if it should."""

    def __init__(self, parts: Parts, loss: Any) -> None:
        self._parts, self._settings, self._loss = parts, parts.settings, loss
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
        if self._bad >= guard.skips:
            raise Stopped(f"{what}; that makes {self._bad} in a row: look at the data or the learning rate")
        report.say(f"warning: {what}, the step is skipped")

    def _what(self, state: TrainState, batch: Any, values: Mapping[str, Any]) -> str:
        if np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"]):
            limit = f"{values['loss_limit']:.4f}, the limit by guard.spike = {self._settings.guard.spike:g} (0 is none)"
            return f"the loss {values['loss']:.4f} is a spike, above {limit}"
        model = computing(self._parts.model(state), self._settings.model.dtype)
        for i in range(batch["tokens"].shape[0]):
            place = model.first_bad_layer(batch["tokens"][i], batch["segments"][i])
            if place is not None:
                return f"NaN or infinity first appears in {place}"
        return f"the gradient is not finite in {bad_gradients(self._loss, state.model, batch, self._parts.base)}"


def bad_gradients(loss: Any, model: Trained, batch: Any, base: Base | None = None) -> str:
    """Names of the parameters, or factors beside `base`, with a gradient that is not finite, with the first layer."""

    def bad_parts(model: Trained, batch: Any, base: Base | None) -> Any:
        gradient, _ = accumulated(beside(loss, base), model, batch)
        return jax.tree.map(lambda x: everywhere(~jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))), gradient)

    found = []
    for path, bad in flatten(jax.device_get(jax.jit(bad_parts)(model, batch, base))).items():
        if bad.any():
            found.append(f"{path}[{int(bad.argmax())}]" if "." in path else path)
    return ", ".join(found[:4]) or "the loss alone"
