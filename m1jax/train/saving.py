"""The checkpoints of a run, to go on from."""

import dataclasses
import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from m1jax import checkpoint
from m1jax.config import M1Config
from m1jax.distributed import gathered
from m1jax.errors import UserError
from m1jax.workplace import check_space, disk_errors

FOLDER = "checkpoints"
# Parts of the identity that older checkpoints lack, and what those had: None passes as anything.
LATER = {
    "data.contents": None,
    "tokenizer": None,
    "data.streams": 1,
    "model.weights": None,
    "lora": "",
    "rl.own_tasks": None,
    "rl.mean_over": None,
    "rl.even_updates": False,
    "rl.recurrent": False,
}


class Checkpoints:
    """The checkpoints of a run: written in the background, the newest `keep` stay, one that is not whole never counts.

    Args:
      out: the run's folder.
      keep: how many stay.
      identity: what a checkpoint must agree in to be gone on from, JSON; its values are named where they differ.
    """

    def __init__(self, out: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self._folder, self._keep, self._identity = out / FOLDER, keep, dict(identity)
        self._pending: Any = None
        self._step = -1
        self._problem: str | None = None
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        policies: Any = ocp.training  # their types are not those that the constructor names
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder.resolve()),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, position: Any) -> str | None:
        """Starts writing a checkpoint; waits for the one before.

        Args:
          step: its number.
          state: arrays.
          position: where the data stands, a table in JSON; of several processes each gives what it knows.

        Returns:
          Why the one before, or the start of this one, failed; None if all is well. The newest whole checkpoint stays.
        """
        problem = self.wait()
        self._step, self._problem = step, None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        position = {name: value for known in gathered(position) for name, value in known.items()}
        note = {"identity": self._identity, "position": position}
        with _quiet() as quiet:
            try:
                check_space(self._folder, size)
                self._pending = self._checkpointer.save_async(step, _filled(state), custom_metadata=note)
            except Exception as error:
                quiet.failed = True
                problem = self._failed(error)
        return problem

    def wait(self) -> str | None:
        """Waits for the checkpoint that is being written; why it failed, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        with _quiet() as quiet:
            try:
                pending.result()
            except Exception as error:
                quiet.failed = True
                return self._failed(error)
        return None

    def _failed(self, error: Exception) -> str:
        """Opens the folder anew, which clears away what is not whole. Raises `UserError` in one of several processes.

        The others may have written their part, or wait for this one: all end, and go on from the checkpoint before.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"the checkpoint of step {self._step} was not written ({checkpoint.short(error)}): make room, then run "
                "again: it goes on from the last good one"
            ) from error
        with _quiet() as quiet:
            quiet.failed = True
            try:
                self._checkpointer.close()
            except Exception:
                logging.getLogger(__name__).debug("closing after a failed save", exc_info=True)
            self._open()
        latest = self.latest
        last = "there is none yet" if latest is None else f"the last good one is that of step {latest}"
        self._problem = f"the checkpoint of step {self._step} was not written ({checkpoint.short(error)}): {last}"
        return self._problem

    def load(self, state: Any) -> tuple[Any, Any]:
        """State and position of the newest checkpoint.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`; gives shapes, dtypes and places.

        Raises:
          UserError: the checkpoint belongs to another model or to other data, or it is damaged.
        """
        damaged = f"{self._folder}/{self.latest} cannot be read"
        remedy = "delete it to go on from the one before"
        with _quiet():
            try:
                note: Any = self._checkpointer.metadata(self.latest).custom_metadata
            except Exception as error:
                raise UserError(f"{damaged} ({checkpoint.short(error)}): {remedy}") from error
        found = LATER | (note.get("identity", {}) if isinstance(note, dict) else {})
        differing = [
            f"{name} {found.get(name)!r}, not {value!r}"
            for name, value in self._identity.items()
            if found.get(name) != value and not (name in LATER and found[name] is None)
        ]
        if differing:
            raise UserError(
                f"{self._folder} was written with {', '.join(differing)}: choose another out, or go back to that"
            )
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        leaves, structure = jax.tree.flatten(abstract)
        with _quiet():
            try:
                found = self._checkpointer.load(self.latest, _filled(abstract))
            except Exception as error:
                raise UserError(f"{damaged} ({checkpoint.short(error)}): {remedy}") from error
        filled = iter(jax.tree.leaves(found))
        whole = [next(filled) if a.size else jnp.zeros(a.shape, a.dtype, device=a.sharding) for a in leaves]
        return jax.tree.unflatten(structure, whole), note["position"]

    def close(self) -> str | None:
        """Waits, then lets go of the folder; why the last checkpoint failed, or None."""
        self.wait()
        self._checkpointer.close()
        return self._problem


def _filled(state: Any) -> Any:
    """The state without the arrays of no layers, which Orbax refuses: those of a kind of layer that a model lacks."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)


def identity(config: M1Config, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a run cannot change when it goes on: the model, and what the stage names."""
    out = {name: value for name, value in dataclasses.asdict(config).items() if not name.endswith("token_id")}
    return json.loads(json.dumps(out | dict(figures)))


class _quiet:
    """Keeps Orbax from logging a traceback from each of its threads before it raises, and from tasks that it forgot.

    Attributes:
      failed: whether something raised inside, which also counts when it was caught.
    """

    failed = False

    def __enter__(self) -> "_quiet":
        self._loggers = {name: logging.getLogger(name) for name in ("absl", "asyncio")}
        self._levels = {name: logger.level for name, logger in self._loggers.items()}
        for logger in self._loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.failed or kind is not None:
            gc.collect()  # a forgotten task speaks when it is collected
        for name, logger in self._loggers.items():
            logger.setLevel(self._levels[name])
