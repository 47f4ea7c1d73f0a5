"""Do two checkpoints compute the same? Logits of a few prompts, one model in memory at a time."""

import gc
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from m1jax.checkpoint import read_marker
from m1jax.errors import UserError
from m1jax.loading import MARKER, load

_LENGTHS = (1, 7, 64)  # tokens of the random prompts
_TEXTS = ("The quick brown fox jumps over the lazy dog.", "1 + 1 =", "Wer reitet so spät durch Nacht und Wind?")
_EXACT, _ROUNDED = 3e-6, 5e-2  # relative RMS allowed with the same weights, and with weights rounded to bfloat16


class Parity(NamedTuple):
    """How far the logits of one prompt are apart."""

    prompt: str
    max_abs: float
    relative_rms: float
    argmax: float  # share of positions with the same argmax

    def within(self, tolerance: float) -> bool:
        """NaN is never within; with equal weights every argmax must agree as well."""
        return self.relative_rms <= tolerance and (tolerance > _EXACT or self.argmax == 1)


def verify(src: Path, dst: Path) -> bool:
    """Prints a table of the parity in float32 of two checkpoints; true if they agree. Raises `UserError`."""
    rounded = (dst / MARKER).exists() and read_marker(dst)["dtype"] == "bfloat16"
    wanted = _logits(src)
    found = _logits(dst)
    if {name: logits.shape for name, logits in wanted.items()} != {
        name: logits.shape for name, logits in found.items()
    }:
        raise UserError(f"{src} and {dst} are different models: their vocabularies or tokenizers differ")
    rows = [compare(name, wanted[name], found[name]) for name in wanted]
    tolerance = _ROUNDED if rounded else _EXACT
    print(f"{'prompt':<44} {'max abs':>9} {'rel. RMS':>9} {'argmax':>7}")
    for row in rows:
        print(f"{row.prompt:<44} {row.max_abs:>9.2e} {row.relative_rms:>9.2e} {row.argmax:>7.1%}")
    good = all(row.within(tolerance) for row in rows)
    why = "weights rounded to bfloat16" if rounded else "the same weights"
    print(f"{'same' if good else 'DIFFERENT'}: relative RMS at most {tolerance:.0e} allowed ({why})")
    return good


def compare(prompt: str, wanted: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    """Parity of two arrays of logits `[T, V]`."""
    difference = found.astype(np.float64) - wanted
    scale = np.sqrt(np.mean(wanted.astype(np.float64) ** 2))
    same = np.mean(wanted.argmax(-1) == found.argmax(-1))
    return Parity(prompt, float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)) / scale), float(same))


def _logits(path: Path) -> dict[str, NDArray[np.float32]]:
    """Logits `[T, V]` by prompt. The model is gone when this returns."""
    model = load(path)
    prompts = _prompts(path, model.config.vocab_size)
    out = {name: np.array(model(jnp.asarray(tokens[None]))[0]) for name, tokens in prompts.items()}
    del model
    gc.collect()
    return out


def _prompts(path: Path, vocab_size: int) -> dict[str, NDArray[np.int32]]:
    """Prompts as int32 `[T]`: random tokens, and where there is a tokenizer, texts."""
    random = np.random.default_rng(0)
    out = {f"{n} random tokens": random.integers(0, vocab_size, n, dtype=np.int32) for n in _LENGTHS}
    if (path / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        for text in _TEXTS:
            ids = np.asarray(tokenizer.encode(text).ids, np.int32)
            if len(ids) and ids.max() < vocab_size:
                out[repr(text)] = ids
    return out
