"""Generating for every line of a JSONL file, in a way that can be killed and continued.

Input: one JSON object per line with `prompt` or `messages` (and `tools`), optionally `id` and `metadata` (both carried
into the output) and options of this line alone, see `prompt.OPTIONS`. Output: one line per text, appended when it is
done, so that a second run generates only what is missing; at the end, lines are put in the input's order. Texts of
another model, dtype or quantisation are never mixed with those that are there.
"""

import dataclasses
import fcntl
import hashlib
import json
import operator
import os
import random
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax
import numpy as np

from m1jax import distributed
from m1jax.engine import Engine
from m1jax.errors import UserError
from m1jax.kernels.experts import Quantized
from m1jax.loading import MARKER
from m1jax.lora.adapter import digest as adapter_digest
from m1jax.model import M1
from m1jax.prompt import OPTIONS, Options, Prompter
from m1jax.reply import Reply, Request, check_context
from m1jax.sampling import MAX_SEED

_SAMPLE = 1 << 16  # bytes of a file of weights, at its beginning, middle and end, that tell it from another

_CONTENT = ("prompt", "messages", "tools", "id", "metadata")
_START = b'{"line": '  # of every line of the output


class Line(NamedTuple):
    """A line of the input: its number (from 1), its request, what is carried into the output, the model's print."""

    number: int
    request: Request
    carried: dict[str, Any]
    model: str = ""

    @property
    def digest(self) -> str:
        """Fingerprint of request and model, by which a later run recognises its own output."""
        request = dataclasses.asdict(self.request)
        for later, absent in {"logprobs": None, "json_schema": None, "calls": ()}.items():
            if request[later] == absent:  # so that what was written before there were any is known
                del request[later]
        text = json.dumps([request, self.model], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """Changes with what a model folder computes, not with where or when it was copied to. Raises `UserError`.

    It is of config.json and of the files of weights: their names, sizes, and some of what they hold.
    """
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        converted = (folder / MARKER).exists()
        files = folder.rglob("*") if converted else folder.glob("*.safetensors")
        for file in sorted(file for file in files if file.is_file()):
            size = file.stat().st_size
            digest.update(repr((str(file.relative_to(folder)), size)).encode())
            if not converted or file.name == MARKER:  # a conversion's own files have names that none other has
                with file.open("rb") as stream:
                    for at in sorted({0, size // 2, max(0, size - _SAMPLE)}):
                        stream.seek(at)
                        digest.update(stream.read(_SAMPLE))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if adapter is not None:
        digest.update(adapter_digest(adapter).encode())
    return digest.hexdigest()


def precision(model: M1) -> str:
    """What a model computes in, as it stands in the output: its dtype, and how its experts are quantised."""
    experts = model.moe.gate_up[...]
    return named_precision(model.dtype.name, experts.kind if isinstance(experts, Quantized) else None)


def named_precision(dtype: str, quantize: str | None) -> str:
    """The same of what a model would be loaded with."""
    return dtype if quantize is None else f"{dtype}, {quantize} experts"


def read_lines(
    file: Path, options: Options, prompter: Prompter, context: int, adapter: Path | None = None
) -> list[Line]:
    """The requests of a JSONL file to a model, maybe with an adapter; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is malformed (its number is named).
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 (byte {error.start}): save it as UTF-8") from None
    out, model = [], fingerprint(prompter.tokenizer.folder, adapter)
    # Not splitlines(): U+2028 and its like may stand inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            out.append(_line(number, line, options, prompter)._replace(model=model))
            check_context(len(out[-1].request.tokens), context)
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    if not out:
        raise UserError(f"{file} has no lines: give one JSON object per line")
    return out


def _line(number: int, text: str, options: Options, prompter: Prompter) -> Line:
    try:
        values = json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError('not a JSON object: write {"prompt": …}')
    unknown = [key for key in values if key not in OPTIONS and key not in _CONTENT]
    if unknown:
        raise UserError(f'unknown key {unknown[0]!r}: put data of your own under "metadata"')
    if ("prompt" in values) == ("messages" in values):
        raise UserError("give either prompt or messages")
    # Of its own, or lines of one prompt would have one text, and those of one length one noise.
    own = random.Random(f"{options.seed} {number}").randrange(MAX_SEED + 1)
    options = dataclasses.replace(options, seed=own).changed(values)
    carried = {key: values[key] for key in ("id", "metadata") if key in values}
    try:
        json.dumps(carried, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UserError("id and metadata must be Unicode: half a surrogate pair cannot be written as UTF-8") from None
    except ValueError:
        raise UserError("id and metadata must hold finite numbers: one is too large to be written again") from None
    if "prompt" in values:
        if not isinstance(values["prompt"], str):
            raise UserError("prompt must be a string")
        if "tools" in values:
            raise UserError("tools go with messages, not with prompt")
        return Line(number, prompter.plain(values["prompt"], options), carried)
    messages, tools = values["messages"], values.get("tools")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("messages must be a list of objects with role and content")
    if tools is not None and not isinstance(tools, list):
        raise UserError("tools must be a list")
    return Line(number, prompter.chat(messages, options, tools), carried)


def _refuse(constant: str) -> NoReturn:
    """Python reads NaN and Infinity, and would write them again."""
    raise ValueError(f"{constant} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of keys that come twice Python would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r} comes twice")
    return values


class Output:
    """The output file, open and locked.

    Opening it repairs a half-written last line. A file that holds anything but output for these lines is refused and
    left as it is.

    Attributes:
      done: (line number, sample) of each text in the file.
      precision: what these were computed in, as `precision` says; None if there are none yet.
    """

    def __init__(self, path: Path, lines: Sequence[Line]) -> None:
        self.path = path
        self.done: set[tuple[int, int]] = set()
        self.precision: str | None = None
        self._digests = {line.number: (line.digest, line.request.n) for line in lines}
        try:
            self._file: BinaryIO = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise UserError(f"{path} is not an ordinary file: choose another --output")
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def continue_in(self, precision: str) -> None:
        """Says what the texts to come are computed in. Raises `UserError` if those in the file are of another."""
        if self.precision not in (None, precision):
            raise UserError(
                f"{self.path} was written for another input or other options (in {self.precision}, not {precision}): "
                "repeat them to continue, or choose another --output"
            )
        self.precision = precision

    def append(self, line: Line, reply: Reply) -> None:
        """Adds a text, in one write: a kill leaves all of it or a torn last line."""
        data = json.dumps(record(line, reply, self.precision), ensure_ascii=False).encode() + b"\n"
        try:
            written = self._file.write(data)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; repeat the command to continue"
            ) from None
        if written != len(data):
            raise UserError(f"{self.path} cannot be written: the disk is full; repeat the command to continue")
        self.done.add((line.number, reply.sample))

    def sort(self) -> None:
        """Puts the lines in the order of the input, atomically."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        try:
            ordered = sorted(lines, key=lambda line: ((r := json.loads(line))["line"], r["sample"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path} was changed by another program meanwhile: choose another --output") from None
        if ordered == lines:
            return
        path = self.path.resolve()
        draft = path.with_name(f".{path.name}.sorted")
        try:
            with open(draft, "wb") as file:
                file.writelines(ordered)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being written by another run: wait for it or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        self._file.seek(0)
        whole, newline, torn = self._file.read().rpartition(b"\n")
        for number, text in enumerate(whole.split(b"\n") if newline else [], 1):
            self._check(number, text)
        if not torn:
            return
        try:
            json.loads(torn)
        except (ValueError, RecursionError):
            # Only a torn line of ours is cut off; anything else is somebody's data.
            if not torn.startswith(_START[: len(torn)]):
                raise UserError(f"{self.path} holds other data: choose another --output") from None
            self._file.truncate(len(whole) + len(newline))
        else:
            self._check(len(self.done) + 1, torn)
            self._file.write(b"\n")

    def _check(self, number: int, text: bytes) -> None:
        try:
            values = json.loads(text)
            key, digest = (operator.index(values["line"]), operator.index(values["sample"])), values["request"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path} holds other data (line {number}): choose another --output") from None
        expected, n = self._digests.get(key[0], (None, 0))
        known = values.get("precision")
        if digest != expected or key[1] not in range(n) or self.precision not in (None, known):
            raise UserError(
                f"{self.path} was written for another input, model or other options (its line {number}): "
                "repeat them to continue, or choose another --output"
            )
        if key in self.done:
            raise UserError(f"{self.path} holds a text twice (its line {number}): remove one")
        self.done.add(key)
        self.precision = known


class Elsewhere(Output):
    """The output in a process that does not write it, nor need see the disk that it is on."""

    def __init__(self, done: Iterable[tuple[int, int]]) -> None:
        self.done = set(done)
        self.precision = None

    def __exit__(self, *_: object) -> None:
        pass

    def append(self, line: Line, reply: Reply) -> None:
        """Notes a text."""
        self.done.add((line.number, reply.sample))

    def sort(self) -> None:
        """Nothing: there is no file."""


def open_output(path: Path, lines: Sequence[Line]) -> Output:
    """The output for these lines. Of several processes the first one has the file, and tells the others what is done.

    Raises `UserError`, also if they have different lines.
    """
    distributed.check_same("--input", [line._replace(model="") for line in lines])
    first = jax.process_index() == 0
    output = Output(path, lines) if first else Elsewhere([])
    done = distributed.of_first(np.asarray(sorted(output.done), np.int32).reshape(-1, 2))
    return output if first else Elsewhere((line, sample) for line, sample in done.tolist())


def record(line: Line, reply: Reply, precision: str | None) -> dict[str, Any]:
    """A line of the output."""
    return {
        "line": line.number,
        "sample": reply.sample,
        **line.carried,
        **describe(reply),
        "prompt_tokens": len(line.request.tokens),
        "seed": line.request.seed,
        "precision": precision,
        "request": line.digest,
    }


def describe(reply: Reply) -> dict[str, Any]:
    """A text for machines: as generated, cut into thinking and answer, why it ended and how long it is.

    And what its request wants to be told of each token.
    """
    told = {} if reply.request.logprobs is None else {"logprobs": [_told(reply, *one) for one in reply.logprobs]}
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "answer": reply.answer,
        "finish": reply.finish,
        "generated_tokens": len(reply.tokens),
        **told,
    }


def _told(reply: Reply, token: int, logprob: float, best: Iterable[tuple[int, float]] | None = None) -> dict[str, Any]:
    told = {"token": reply.tokenizer.text_of(token), "id": token, "logprob": logprob}
    return told if best is None else {**told, "best": [_told(reply, *one) for one in best]}


def generate_lines(engine: Engine, lines: Sequence[Line], output: Output, max_rows: int) -> Iterator[int]:
    """Generates and writes what is missing; yields how many texts are done. Ends early when the engine is cancelled.

    Raises `UserError` if the texts that are there were computed in another precision.
    """
    output.continue_in(precision(engine.model))
    index_of = {line.number: i for i, line in enumerate(lines)}
    done = {(index_of[number], sample) for number, sample in output.done}
    for event in engine.generate([line.request for line in lines], max_rows, done=done):
        if event.reply.finish not in (None, "interrupted"):
            output.append(lines[event.request], event.reply)
            yield len(output.done)
