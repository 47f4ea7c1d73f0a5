"""Documents to batches of packed rows, through grain: lazy, shuffled, endless, and with a position that can be saved.

A document is a text file, a line of a JSONL file, or an array of tokens. A sample is what of it fits in one row, each
token with the one after it as its target and a weight. Samples share rows; each is a segment there.
"""

import array
import bisect
import codecs
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m1jax import distributed
from m1jax.chat_template import ChatTemplate
from m1jax.errors import UserError
from m1jax.reply import CLOSE, OPEN
from m1jax.tokenizer import Tokenizer
from m1jax.train.settings import DataSettings

Kind = Literal["text", "jsonl", "tokens"]
Sample = dict[str, NDArray[Any]]

_SUFFIXES: dict[str, Kind] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".npy": "tokens"}
_PART = 1 << 20  # bytes of a text file that make a document, up to the end of a line
# What tokens, ends of turns and chat template come from.
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
PATIENCE = 5  # seconds after which a bar shows how far the check is
_LOOKED_AT = 1 << 20  # bytes at either end of a file that its fingerprint is about


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a document is: bytes of a text or JSONL file, or items of an array."""

    file: Path
    kind: Kind
    first: int
    last: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.kind == "jsonl" else str(self.file)


class Documents:
    """The documents of some files, by number; the files are read when they are asked for.

    Args:
      patterns: names of files, or patterns of them; a file that several fit, or links lead to, counts once.
      length: tokens of a row.
      name: of the setting, for messages.
      without: patterns of files to leave out.

    Raises:
      UserError: no file matches, or one is empty, unreadable, of another kind or not UTF-8.
    """

    def __init__(
        self, patterns: Sequence[str], length: int, name: str = "data.files", without: Sequence[str] = ()
    ) -> None:
        for pattern in patterns:
            if not glob.glob(pattern, recursive=True):
                raise UserError(f"{name}: {pattern} matches no file")
        if not patterns:
            raise UserError(f"{name} is empty: name the files to train on")
        left_out = _matching(without)
        files = [file for real, file in _matching(patterns).items() if real not in left_out]
        if not files:
            raise UserError(f"{name} matches nothing but files of data.validation, which are not trained on")
        self.name = name
        self._shelves = [_shelf(file, length, name) for file in files]
        self._ends = list(itertools.accumulate(map(len, self._shelves)))
        self.fingerprint = digest([(file.name, file.stat().st_size) for file in files])
        self.contents = digest([_ends(file) for file in files])

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> Place:
        """Where document number `index` is."""
        number = bisect.bisect_right(self._ends, index)
        shelf = self._shelves[number]
        return shelf[index - self._ends[number] + len(shelf)]

    def part(self, first: int, step: int) -> Iterator[tuple[Place, Any]]:
        """Every so many of the documents, in their order; a file is opened once."""
        places = map(self.place, range(first, len(self), step))
        for (file, kind), some in itertools.groupby(places, lambda place: (place.file, place.kind)):
            with _reader(file, kind) as read:
                yield from ((place, read(place)) for place in some)

    def __getitem__(self, index: Any) -> tuple[Place, Any]:
        """A document: text, the object of a JSONL line, or tokens."""
        place = self.place(int(index))
        with _reader(place.file, place.kind) as read:
            return place, read(place)


def _matching(patterns: Sequence[str]) -> dict[Path, Path]:
    """Files that the patterns fit, in the order of their names; by where links lead, which may be one place."""
    found = sorted({Path(name) for pattern in patterns for name in glob.glob(pattern, recursive=True)}, reverse=True)
    return dict(sorted({file.resolve(): file for file in found}.items(), key=lambda item: item[1]))


class _Texts(Sequence[Place]):
    """Documents of a text or JSONL file: a corpus has many, and as numbers they are small."""

    def __init__(self, file: Path, kind: Kind, bounds: Iterable[tuple[int, int, int]]) -> None:
        self._kind: Kind = kind
        flat = array.array("q", itertools.chain.from_iterable(bounds))
        self._file = file
        self._bounds = np.frombuffer(flat, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: Any) -> Any:
        first, last, line = self._bounds[index].tolist()
        return Place(self._file, self._kind, first, last, line)


class _Tokens(Sequence[Place]):
    """Stretches of `length` + 1 tokens of an array, each beginning with the last token of the one before."""

    def __init__(self, file: Path, size: int, length: int) -> None:
        self._file, self._size, self._length = file, size, length

    def __len__(self) -> int:
        return -(-max(self._size - 1, 0) // self._length)

    def __getitem__(self, index: Any) -> Any:
        first = index * self._length
        return Place(self._file, "tokens", first, min(first + self._length + 1, self._size), 0)


@contextlib.contextmanager
def _reader(file: Path, kind: Kind) -> Iterator[Callable[[Place], Any]]:
    """Reads what lies at places of an opened file."""
    if kind == "tokens":
        tokens = np.load(file, mmap_mode="r")
        yield lambda place: np.asarray(tokens[place.first : place.last])
        return
    with file.open("rb") as stream:

        def read(place: Place) -> Any:
            stream.seek(place.first)
            text = stream.read(place.last - place.first).decode("utf-8")
            return _json(text, place) if kind == "jsonl" else text

        yield read


def digest(value: Any) -> str:
    """16 hexadecimal digits of a hash of the value's `repr`."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _ends(file: Path) -> bytes:
    """Digest of a file's first and last bytes: to read all of a large corpus takes too long."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_LOOKED_AT))
        stream.seek(max(0, file.stat().st_size - _LOOKED_AT))
        digest.update(stream.read())
    return digest.digest()


def fingerprint(tokenizer: Tokenizer | None) -> str:
    """Digest of a tokenizer's files, empty without one."""
    if tokenizer is None:
        return ""
    files = [tokenizer.folder / name for name in _TOKENIZER]
    return digest([(file.name, file.read_bytes()) for file in files if file.is_file()])


def _json(text: str, place: Place) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object such as {{'text': …}}, found {type(value).__name__}")
    return value


def _shelf(file: Path, length: int, name: str) -> Sequence[Place]:
    kind = _SUFFIXES.get(file.suffix)
    if kind is None:
        raise UserError(f"{file}: unknown kind {file.suffix!r}: known are {', '.join(_SUFFIXES)}")
    try:
        if kind == "tokens":
            places = _Tokens(file, _size(file), length)
        else:
            places = _Texts(file, kind, _text_bounds(file, kind))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not places:
        raise UserError(f"{file} is empty: remove it from {name}")
    return places


def _size(file: Path) -> int:
    """How many tokens an array holds."""
    try:
        tokens = np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is not a NumPy file ({error})") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{file} is an archive of arrays: save one array with numpy.save")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{file} holds {tokens.dtype} {tokens.shape}: expected integers of one dimension")
    return len(tokens)


def _text_bounds(file: Path, kind: Kind) -> Iterator[tuple[int, int, int]]:
    """First and last byte and line of each document: lines of a JSONL file, parts of a text; all must be UTF-8."""
    at = first = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                at = first = len(codecs.BOM_UTF8)
                line = line[first:]
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 (line {number}, byte {at + error.start}): save it so") from None
            at += len(line)
            if kind == "jsonl":
                if line.strip():
                    yield first, at, number
                first = at
            elif at - first >= _PART:
                yield first, at, number
                first = at
    if at > first:
        yield first, at, 0


@contextlib.contextmanager
def _blamed(place: Place) -> Iterator[None]:
    """Puts the document's place into a `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}" if str(place) not in str(error) else str(error)) from None


class Encoder:
    """Documents to samples.

    Args:
      tokenizer: of the model; None if all files hold tokens.
      length: tokens of a row.
      vocab_size: V, which no token may reach.
      end: token after each text document, if any.
    """

    def __init__(self, tokenizer: Tokenizer | None, length: int, vocab_size: int, end: int | None) -> None:
        self._tokenizer, self._length, self._vocab_size, self._end = tokenizer, length, vocab_size, end

    def __call__(self, document: tuple[Place, Any]) -> list[Sample]:
        """Samples of a document; empty for one of fewer than two tokens. Raises `UserError` naming its place."""
        with _blamed(document[0]):
            return self._samples(document[1])

    def check(self, document: tuple[Place, Any]) -> None:
        """Raises the `UserError` that the call would, without encoding texts, which takes long."""
        place, value = document
        with _blamed(place):
            text = value.get("text") if isinstance(value, dict) else value
            if isinstance(text, str):
                self._need_tokenizer().check(text)
            else:
                self._samples(value)

    def _samples(self, value: Any) -> list[Sample]:
        if isinstance(value, np.ndarray):
            return self._cut(value, np.ones(len(value), np.float32))
        if isinstance(value, str):
            return self._text(value)
        if "text" in value:
            if not isinstance(value["text"], str):
                raise UserError("text is not a string")
            return self._text(value["text"])
        if "tokens" in value:
            return self._encoded(value)
        tokens, weights = chat_tokens(self._need_tokenizer(), _messages(value), _tools(value))
        if len(tokens) - 1 > self._length:
            raise UserError(f"the conversation has {len(tokens)} tokens: raise data.length or remove it")
        return self._cut(tokens, weights)

    def _encoded(self, value: Mapping[str, Any]) -> list[Sample]:
        try:
            tokens = np.asarray(value["tokens"])
            if not np.issubdtype(tokens.dtype, np.integer) and tokens.size:
                raise TypeError
            weights = np.asarray(value.get("weights", np.ones(len(tokens))), np.float32)
        except (TypeError, ValueError, OverflowError):
            raise UserError("tokens or weights is not a list of numbers") from None
        if tokens.ndim != 1 or weights.shape != tokens.shape:
            raise UserError(f"tokens and weights must be lists of one length, not {tokens.shape} and {weights.shape}")
        if not np.all(np.isfinite(weights) & (weights >= 0)):
            raise UserError("weights must be finite, and 0 or more")
        return self._cut(tokens, weights)

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("text needs a tokenizer: set model.tokenizer")
        return self._tokenizer

    def _text(self, text: str) -> list[Sample]:
        ids = self._need_tokenizer().encode(text)
        tokens = np.asarray([*ids, *([] if self._end is None else [self._end])], np.int32)
        return self._cut(tokens, np.ones(len(tokens), np.float32))

    def _cut(self, tokens: NDArray[np.integer[Any]], weights: NDArray[np.float32]) -> list[Sample]:
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if outside.size:
            raise UserError(f"token {outside[0]} is outside the model's vocabulary of {self._vocab_size}")
        tokens = tokens.astype(np.int32)
        stretches = [slice(at, at + self._length + 1) for at in range(0, len(tokens) - 1, self._length)]
        return [
            {"tokens": tokens[part][:-1], "targets": tokens[part][1:], "weights": weights[part][1:]}
            for part in stretches
        ]


def _messages(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "messages" in value:
        if not isinstance(value["messages"], list) or not all(isinstance(m, dict) for m in value["messages"]):
            raise UserError("messages is not a list of objects")
        return value["messages"]
    if "prompt" in value and "response" in value:
        turns = (("user", value["prompt"]), ("assistant", value["response"]))
        return [{"role": role, "content": text} for role, text in turns]
    raise UserError(f"has neither text, tokens, messages, nor prompt and response, but {', '.join(value) or 'nothing'}")


def _tools(value: Mapping[str, Any]) -> list[Any]:
    if not isinstance(value.get("tools") or [], list):
        raise UserError("tools is not a list")
    return value.get("tools") or []


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens `[n]` of a conversation and weights: 1 for what the assistant says, to the end of its turn, else 0.

    Each turn is encoded by itself, as generation sees it: the prompt is tokens before the answer begins. A message's
    own `weight` takes the place of the 1, its `reasoning_content` or `reasoning` comes before its content, in the tags
    that M1 thinks in. `tools` are the functions on offer, as the chat template takes them.

    Raises:
      UserError: there is no chat template or no assistant, the template changes earlier turns, or a message is not as
        it should be.
    """
    if tokenizer.template is None:
        raise UserError(f"{tokenizer.folder} has no chat template: conversations need one")
    template = _template(tokenizer)
    messages = [_with_reasoning(message) for message in messages]
    ids: list[int] = []
    weights: list[float] = []
    done = ""
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        after = template.render(messages[: i + 1], tools, add_generation_prompt=False)
        before = template.render(messages[:i], tools) if i else _opened(template, message, after, tools)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template writes earlier turns differently later on: give single turns")
        prompt, answer = tokenizer.encode(before[len(done) :]), tokenizer.encode(after[len(before) :])
        last = next((n + 1 for n, token in enumerate(answer) if token in tokenizer.eos_ids), len(answer))
        ids += prompt + answer
        weights += [0.0] * len(prompt) + [_weight(message)] * last + [0.0] * (len(answer) - last)
        done = after
    if not done:
        raise UserError("the conversation has no assistant's message to learn")
    return np.asarray(ids, np.int32), np.asarray(weights, np.float32)


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its reasoning at the head of its content."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if message.get("role") != "assistant" or not reasoning:
        return message
    if not isinstance(reasoning, str):
        raise UserError("reasoning_content is not a string")
    thought, content = f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n", message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    return {**message, "content": [{"type": "text", "text": thought}, *parts]}


def _weight(message: Mapping[str, Any]) -> float:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise UserError(f"weight {weight!r} of a message must be a number, 0 or more")
    return float(weight)


def _opened(template: ChatTemplate, message: Mapping[str, Any], after: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """What comes before the words of an assistant who speaks first: no template renders the empty conversation.

    Its turn opens as the one does that the template would add next. `after` is the conversation of this message.
    """
    whole = template.render([message], tools)
    opening = whole.removeprefix(after)
    return after[: after.index(opening) + len(opening)] if opening in after else whole


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    assert tokenizer.template is not None
    return ChatTemplate(tokenizer.template, tokenizer.special)


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
        shuffled = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()  # pyright: ignore
        self._streams = {
            str(s): self._stream(shuffled[s :: settings.streams], encoder)
            for s in sorted({row // self._each for row in rows})
        }

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
    Several processes divide the documents among themselves.
    """
    problem, first, step = None, jax.process_index(), jax.process_count()
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
            encoder.check(document)
    except UserError as error:
        problem = str(error)
    for found in distributed.gathered(problem):
        if found is not None:
            raise UserError(found)
    # Without a single sample grain would look for one forever.
    if not any(encoder(document) for document in documents.part(0, 1)):
        raise UserError(f"{documents.name}: no document has two tokens or more")


def _shape(packed: Mapping[str, Any], accumulate: int) -> dict[str, NDArray[Any]]:
    names = {"tokens": "tokens", "targets": "targets", "weights": "weights", "tokens_segment_ids": "segments"}
    out = {ours: np.asarray(packed[theirs]) for theirs, ours in names.items()}
    return {name: x.reshape(accumulate, -1, x.shape[-1]) for name, x in out.items()}
