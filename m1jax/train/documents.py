"""The documents of a corpus, by number, and where each is: a text file, a line of a JSONL file, tokens of an array."""

import array
import bisect
import codecs
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m1jax.errors import UserError

Kind = Literal["text", "jsonl", "tokens"]

_SUFFIXES: dict[str, Kind] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".npy": "tokens"}
_PART = 1 << 20  # bytes of a text file that make a document, up to the end of a line
_LOOKED_AT = 1 << 20  # bytes at either end of a file that its fingerprint is about


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a document is: bytes of a text or JSONL file, or items of an array."""

    file: Path
    kind: Kind
    first: int
    last: int
    line: int  # of a JSONL file; of a text 0, but in parts of it that others follow

    @property
    def ends(self) -> bool:
        """Whether the document is not a part of a text that others follow."""
        return self.kind != "text" or not self.line

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
        # Once, each part of a text had a token at its end: runs of that time do not go on with what is read now.
        parted = [b"parts"] * any(not shelf[0].ends for shelf in self._shelves)
        self.contents = digest([_ends(file) for file in files] + parted)

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
            if kind == "text" and at - first >= _PART:
                yield first, at, number - 1
                first = at
            at += len(line)
            if kind == "jsonl":
                if line.strip():
                    yield first, at, number
                first = at
    if at > first:
        yield first, at, 0
