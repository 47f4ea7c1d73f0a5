"""Stages `pretrain` and `sft` of `python -m m1jax.train`: steps on documents."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m1jax.distributed import check_same, gathered
from m1jax.errors import UserError
from m1jax.sharding.rules import shards
from m1jax.tokenizer import Tokenizer
from m1jax.train import data
from m1jax.train.documents import Documents, digest
from m1jax.train.encoder import Encoder, fingerprint
from m1jax.train.guard import Guard, Stopped
from m1jax.train.loop import by_rows, drive, fetched, figures, size, to_devices
from m1jax.train.loss import Balance
from m1jax.train.parts import Parts, prepare
from m1jax.train.report import Report
from m1jax.train.settings import Settings
from m1jax.train.step import TrainState, cross_entropy, make_step, measuring, schedule
from m1jax.workplace import disk_errors

CHECKED = "data.checked"  # a file in `out` that says which data needs no second look


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
        self._guard = Guard(parts, loss)

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
        state, metrics = self._step(state, batch, base=self._parts.base)
        metrics = fetched(metrics)
        values = figures(metrics)
        report.step(number, values | {"learning_rate": rate}, *size(metrics))
        try:
            self._guard.look(number, state, batch, metrics, report)
        except Stopped as stopped:
            stopped.state = dataclasses.replace(state, step=state.step - 1)  # a bad step changes no weight
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
            found = fetched(self._measure(self._parts.model(state), to_devices(rows, self._parts.mesh)))
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
