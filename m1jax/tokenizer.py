"""Text to tokens and back: Hugging Face tokenizer folders, and decoding piece by piece without broken characters.

A folder holds either a `tokenizer.json` or, as GPT-2 did, `vocab.json` and `merges.txt` (official M1 ships all three;
`tokenizer.json` wins), beside `tokenizer_config.json` with the special tokens and the chat template.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from m1jax.errors import UserError

LONG = 1 << 16  # characters
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A tokenizer folder, read.

    Attributes:
      folder: where it came from.
      special: special tokens by role, e.g. ``{"eos_token": "<end_of_sentence>"}``.
      template: source of the chat template, None if the folder has none.
      eos_ids: tokens that end a turn: the tokenizer's `eos_token` and those of `generation_config.json`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: Path,
        special: Mapping[str, str],
        template: str | None,
        eos_ids: Iterable[int],
    ) -> None:
        self.folder = folder
        self.special = dict(special)
        self.template = template
        self.eos_ids = frozenset(eos_ids)
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a tokenizer folder.

        Raises:
          UserError: no tokenizer there, or a file of it cannot be read.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        backend = _backend(folder, config, special)
        eos = set(_eos_of_generation_config(folder))
        if "eos_token" in special:
            index = backend.token_to_id(special["eos_token"])
            if index is None:
                raise UserError(
                    f"{folder}: eos_token {special['eos_token']!r} of tokenizer_config.json is not in the vocabulary: "
                    "copy the tokenizer files again"
                )
            eos.add(index)
        return cls(backend, folder, special, _template(folder, config), eos)

    @property
    def json(self) -> str:
        """The content of its `tokenizer.json`."""
        return self._backend.to_str()

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab_size(), max(self._added, default=-1) + 1)

    @property
    def longest(self) -> int:
        """The most bytes that a token stands for."""
        return max((len(self.bytes_of(index)) for index in range(self.size)), default=0)

    @staticmethod
    def check(text: str) -> None:
        """Raises `UserError` if the text cannot be encoded."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text is not valid UTF-8: save it as UTF-8") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it stands: nothing is added, special tokens written in it are recognised."""
        self.check(text)
        if len(text) < LONG:
            return self._backend.encode(text, add_special_tokens=False).ids
        # This lets Python's other threads run meanwhile.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int], keep: Iterable[str] | None = ()) -> str:
        """Text of token ids; `keep` as in `Detokeniser`."""
        stream = Detokeniser(self, keep)
        return "".join([*map(stream.push, ids), stream.flush()])

    def id_of(self, token: str) -> int | None:
        """Id of a token given by name, None if there is none."""
        return self._backend.token_to_id(token)

    def name_of(self, index: int) -> str | None:
        """The token's name in the vocabulary; None past its end (a model's vocabulary may be padded)."""
        return self._backend.id_to_token(index)

    def is_special(self, index: int) -> bool:
        """Whether the token is a mark for the model rather than text for the reader."""
        return index in self._added and self._added[index].special

    def bytes_of(self, index: int) -> bytes:
        """What the token stands for in a byte-level vocabulary; empty past the vocabulary's end."""
        name = self.name_of(index)
        if name is None:
            return b""
        table = _bytes_of_characters()
        if index in self._added or not all(c in table for c in name):
            return name.encode()
        return bytes(table[c] for c in name)

    def text_of(self, index: int) -> str:
        """A token for a reader: what it stands for, or its name."""
        if not self._byte_level:
            return self.name_of(index) or ""
        return self.bytes_of(index).decode(errors="replace")


class Detokeniser:
    """Turns tokens into text as they come; a character is emitted once its last byte is there.

    Args:
      tokenizer: whose tokens they are.
      keep: special tokens to show; all others are left out. None shows all.
    """

    def __init__(self, tokenizer: Tokenizer, keep: Iterable[str] | None = ()) -> None:
        self._tokenizer = tokenizer
        self._keep = None if keep is None else frozenset(keep)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stream = decoders.DecodeStream(skip_special_tokens=False)  # for a vocabulary that is not byte-level
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, index: int) -> str:
        """The text that this token completes; often empty for a part of a character."""
        if self._hidden(index):
            return ""
        if self._tokenizer._byte_level:
            return self._utf8.decode(self._tokenizer.bytes_of(index))
        self._ids.append(index)
        text = self._stream.step(self._tokenizer._backend, index) or ""
        self._emitted += len(text)
        return text

    @property
    def inside_character(self) -> bool:
        """Whether bytes of a character are missing."""
        return self._tokenizer._byte_level and bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """The text still held back: replacement characters for what never became a character."""
        if self._tokenizer._byte_level:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer._backend.decode(self._ids, skip_special_tokens=False)[self._emitted :]

    def _hidden(self, index: int) -> bool:
        if self._keep is None or not self._tokenizer.is_special(index):
            return False
        return self._tokenizer.name_of(index) not in self._keep


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 is itself, the rest counts up from U+0100."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object: copy it again")
    return values


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a token is written as a string or as an object with its `content`."""
    out: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_NAMES:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                out.setdefault(name, token)
    return out


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else `chat_template` of the config: one source or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): copy it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_of_generation_config(folder: Path) -> list[int]:
    value = _read_json(folder / "generation_config.json").get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise UserError(
            f"{folder / 'generation_config.json'}: eos_token_id {value!r} is neither a token's id nor a list of them"
        )
    return values


def _backend(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> tokenizers.Tokenizer:
    file, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            backend = tokenizers.Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            backend = _gpt2(folder, config)
        else:
            raise UserError(
                f"{folder} has no tokenizer.json (nor vocab.json and merges.txt): copy the tokenizer files there"
            )
        added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in special.values()]
        # A special token that the vocabulary lacks stays unknown instead of getting an id the model never saw.
        backend.add_special_tokens([token for token in added if backend.token_to_id(token.content) is not None])
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"the tokenizer in {folder} cannot be read ({error}): copy its files again") from None
    return backend


def _gpt2(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from `vocab.json` and `merges.txt`."""
    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    # What no merge produces can only ever have been a token of its own: M1 keeps its marks in vocab.json.
    merged = {left + right for left, right in merges}
    marks = [name for name in vocab if len(name) > 1 and name not in merged]
    backend.add_special_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in marks])
    listed = {token: int(i) for token, i in _read_json(folder / "added_tokens.json").items()}
    described = config.get("added_tokens_decoder") or {}
    listed |= {entry["content"]: int(i) for i, entry in described.items()}
    plain = {entry["content"] for entry in described.values() if not entry.get("special")}
    for token, index in sorted(listed.items(), key=lambda item: item[1]):
        add = backend.add_tokens if token in plain else backend.add_special_tokens
        add([tokenizers.AddedToken(token, special=token not in plain, normalized=False)])
        if backend.token_to_id(token) != index:
            raise UserError(f"{folder}: added token {token!r} should have id {index}: use a folder with tokenizer.json")
    return backend
