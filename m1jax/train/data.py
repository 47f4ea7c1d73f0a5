"""Documents to batches of packed rows, through grain: lazy, shuffled, endless, and with a position that can be saved.

A sample is what of a document fits in one row, each token with the one after it as its target and a weight. Samples
share rows; each is a segment there.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m1jax import distributed
from m1jax.errors import UserError
from m1jax.sharding import sizes
from m1jax.train.documents import Documents, Place
from m1jax.train.encoder import Encoder, Sample, TooLong
from m1jax.train.settings import DataSettings

try:
    import grain
except ImportError:
    raise UserError("training needs grain: pip install 'm1jax[train]'") from None

PATIENCE = 5  # seconds after which a bar shows how far the check is
FILLING, FILLED = 36, 16  # bytes of a token in rows that are being filled, with grain's own notes, and in a batch


class _Split(grain.experimental.FlatMapTransform):
    """Grain's wrapping of an encoder."""

    max_fan_out = 1 << 30

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def flat_map(self, element: tuple[Place, Any]) -> list[Sample]:
        return self._encoder(element)


class Batches:
    """Endless batches: `tokens`, `targets`, `weights`, `segments`, each `[A, rows, length]`.

    Every epoch has an order of its own, which `seed` fixes. Its documents are dealt out to `settings.streams` streams,
    and stream s of S fills the rows from s · rows / S on: no row depends on who reads which.

    Args:
      documents: what is read.
      encoder: makes samples of them.
      settings: shapes, and how rows are filled.
      seed: of the order.
      own: the rows that are asked for; the streams of others are not read, and their rows hold zeros.

    Raises:
      UserError: the rows do not fit into memory.
    """

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        settings: DataSettings,
        seed: int,
        own: Sequence[slice] = (slice(None),),
    ) -> None:
        self._settings, self._each = settings, settings.rows // settings.streams
        rows = {row for part in own for row in range(*part.indices(settings.rows))}
        streams = sorted({row // self._each for row in rows})
        each = FILLING * settings.bins + FILLED * settings.accumulate * self._each
        needed = each * settings.length * len(streams)
        if needed > sizes.host_memory():
            raise UserError(
                f"data.length = {settings.length} with data.bins = {settings.bins} and data.rows = {settings.rows} "
                f"needs {needed / 1e9:.0f} GB of memory: lower one of them"
            )
        shuffled = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()  # pyright: ignore
        self._streams = {str(s): self._stream(shuffled[s :: settings.streams], encoder) for s in streams}

    def _stream(self, documents: Any, encoder: Encoder) -> grain.DatasetIterator:
        accumulate = self._settings.accumulate
        shaped = (
            _packed(documents, encoder, self._settings)
            .batch(accumulate * self._each, drop_remainder=True)
            .map(functools.partial(_shape, accumulate=accumulate))
        )
        return iter(grain.experimental.ThreadPrefetchIterDataset(shaped, prefetch_buffer_size=2))  # pyright: ignore

    def __next__(self) -> dict[str, NDArray[Any]]:
        found = {int(s): next(stream) for s, stream in self._streams.items()}
        if self._settings.streams == 1:
            return found[0]
        some = next(iter(found.values()))
        shape = (self._settings.accumulate, self._settings.rows, self._settings.length)
        out = {name: np.zeros(shape, x.dtype) for name, x in some.items()}
        for s, part in found.items():
            for name, x in part.items():
                out[name][:, s * self._each : (s + 1) * self._each] = x
        return out

    def get_state(self) -> dict[str, Any]:
        """The position of each stream that is read here, JSON."""
        return {s: stream.get_state() for s, stream in self._streams.items()}

    def set_state(self, position: Mapping[str, Any]) -> None:
        """Goes on from the positions of all streams."""
        for s, stream in self._streams.items():
            stream.set_state(position.get(s, position))  # before there were several, it was that of the only one

    def close(self) -> None:
        """Ends the threads that read ahead."""
        for stream in self._streams.values():
            stream.close()


def one_pass(documents: Documents, encoder: Encoder, settings: DataSettings) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches `[1, rows, length]` of all documents, each once and in their order; rows of padding fill the last."""
    in_order = grain.MapDataset.source(documents)  # pyright: ignore
    for rows in _packed(in_order, encoder, settings).batch(settings.rows, drop_remainder=False):
        missing = settings.rows - len(rows["tokens"])
        yield _shape({name: np.pad(x, ((0, missing), (0, 0))) for name, x in rows.items()}, accumulate=1)


def _packed(documents: Any, encoder: Encoder, settings: DataSettings) -> Any:
    """Samples that share rows, as a dataset of grain's."""
    # Packing needs a single thread's order; reading ahead happens at the end, for whole batches.
    split = grain.experimental.FlatMapIterDataset(
        documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), _Split(encoder)
    )
    lengths = dict.fromkeys(("tokens", "targets", "weights"), settings.length)
    return grain.experimental.FirstFitPackIterDataset(
        split, length_struct=lengths, num_packing_bins=settings.bins, shuffle_bins=False
    )


def check(documents: Documents, encoder: Encoder) -> None:
    """Raises `UserError`, in every process, if a document is not as it should be, or none has two tokens.

    A bad one, found late, would end the run and every one after it: without it the data would not be the same.
    Several processes divide the documents among themselves. Of conversations that are too long all are counted.
    """
    problem, first, step = None, jax.process_index(), jax.process_count()
    long: list[TooLong] = []
    own = tqdm(
        documents.part(first, step),
        f"checking {documents.name}",
        len(range(first, len(documents), step)),
        leave=False,
        delay=PATIENCE,
        disable=None,
    )
    try:
        for document in own:
            try:
                encoder.check(document)
            except TooLong as error:
                long.append(error)
    except UserError as error:
        problem = str(error)
    told = distributed.gathered((problem, [str(error) for error in long[:1]], [error.tokens for error in long]))
    for found, _, _ in told:
        if found is not None:
            raise UserError(found)
    if tokens := [n for _, _, some in told for n in some]:
        one = next(text for _, texts, _ in told for text in texts)
        more = f" … and {len(tokens) - 1} more; the longest has {max(tokens)} tokens"
        raise UserError(one + more * (len(tokens) > 1))
    # Without a single sample grain would look for one forever.
    if not any(encoder(document) for document in documents.part(0, 1)):
        raise UserError(f"{documents.name}: no document has two tokens or more")


def _shape(packed: Mapping[str, Any], accumulate: int) -> dict[str, NDArray[Any]]:
    names = {"tokens": "tokens", "targets": "targets", "weights": "weights", "tokens_segment_ids": "segments"}
    out = {ours: np.asarray(packed[theirs]) for theirs, ours in names.items()}
    return {name: x.reshape(accumulate, -1, x.shape[-1]) for name, x in out.items()}
