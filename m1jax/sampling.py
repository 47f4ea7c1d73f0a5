"""Choosing the next token: logit filters and the sampler, on the device, in float32, with one setting per row.

Order and meaning are those of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p, then a
draw from what is left. Filters here are symmetric in ties: a token is judged by how much lies strictly above it, so
that equal logits are kept or dropped together and no sort order matters.

Letters: B batch rows, V vocabulary.
"""

import dataclasses
import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m1jax.errors import UserError

MAX_SEED = 2**32 - 1
ALTERNATIVES = 20  # tokens whose probability is told beside that of the one chosen, at most
_FLOAT32 = np.finfo(np.float32)
_LARGEST, _SMALLEST = float(_FLOAT32.max), float(_FLOAT32.tiny)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one text is sampled. The defaults of temperature and top-p are those recommended for M1.

    Attributes:
      temperature: logits are divided by it; 0 is greedy (the largest logit, the first one among equals).
      top_k: keep tokens with fewer than top_k tokens strictly above them; 0 keeps all.
      top_p: keep tokens with less than top_p probability strictly above them; 1 keeps all.
      min_p: keep tokens at least min_p times as probable as the most probable one; 0 keeps all.
      repetition_penalty: logits of tokens in the prompt or the text so far are divided by it if positive, multiplied
        if negative (Keskar et al., arXiv 1909.05858); 1 is none.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds = (int, np.integer) if field.name == "top_k" else (int, float, np.integer, np.floating)
            value = getattr(self, field.name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                number = "an integer" if field.name == "top_k" else "a number"
                raise UserError(f"{field.name.replace('_', '-')} must be {number}, not {reprlib.repr(value)}")
        # Comparisons, because an integer of a JSON file may be too large to become a float.
        if not 0 <= self.temperature <= _LARGEST:
            raise UserError(
                f"temperature must be from 0 (greedy) to {_LARGEST:.3g}, not {reprlib.repr(self.temperature)}"
            )
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top-k must be 0 (off) or more, not {reprlib.repr(self.top_k)}")
        if not _SMALLEST <= self.top_p <= 1:
            raise UserError(f"top-p must be from {_SMALLEST:.3g} to 1 (off), not {reprlib.repr(self.top_p)}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p must be from 0 (off) to 1, not {reprlib.repr(self.min_p)}")
        if not 0 < self.repetition_penalty <= _LARGEST:
            raise UserError(
                f"repetition-penalty must be above 0 (1 is off) and at most {_LARGEST:.3g}, "
                f"not {reprlib.repr(self.repetition_penalty)}"
            )


DEFAULT_SAMPLING = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The `Sampling` of each row, arrays `[B]`, and the source of its randomness: `seed` uint32 and `sample` int32."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    sample: jax.Array | np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[Sampling, int, int]]) -> "SamplingRows":
        """From (settings, seed, sample index) of each row."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(settings, name) for settings, _, _ in rows], dtype)

        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            seed=np.array([seed for _, seed, _ in rows], np.uint32),
            sample=np.array([sample for _, _, sample in rows], np.int32),
        )


def only(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Tokens without a bit become -inf; logits `[B, V]`, allowed int32 `[B, ceil(V / 32)]`, the lowest bit first."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def penalise_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """logits float32 `[B, V]`, seen bool `[B, V]`, penalty `[B]`."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Tokens with k or more strictly above them become -inf; logits `[B, V]`, k int32 `[B]`, 0 keeps all."""
    order = _order(logits)
    least = _least(order, jnp.ones_like(logits), k.astype(jnp.float32))
    return jnp.where((order >= least[:, None]) | (k <= 0)[:, None], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens with probability p or more strictly above them become -inf; logits `[B, V]`, p `[B]`, 1 keeps all."""
    order = _order(logits)
    least = _least(order, jax.nn.softmax(logits, axis=-1), p)
    return jnp.where((order >= least[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens less than p times as probable as the best become -inf; logits `[B, V]`, p `[B]`, 0 keeps all."""
    floor = jnp.max(logits, axis=-1) + jnp.log(p)
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


def filtered(logits: jax.Array, rows: SamplingRows, seen: jax.Array) -> jax.Array:
    """Logits float32 `[B, V]` after every filter; -inf where a token cannot be drawn.

    Greedy rows only get the repetition penalty, the others' best token has 0. A filter that no row asks for costs
    nothing.
    """
    logits = lax.cond(
        jnp.any(rows.repetition_penalty != 1), penalise_repetition, _unchanged, logits, seen, rows.repetition_penalty
    )
    random = rows.temperature > 0
    # Seen from the best token: that one stays finite however small the temperature, which devices may round to 0.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled /= jnp.where(random, jnp.maximum(rows.temperature, _FLOAT32.tiny), 1)[:, None]
    scaled = lax.cond(jnp.any(random & (rows.top_k > 0)), keep_top_k, _first, scaled, rows.top_k)
    scaled = lax.cond(jnp.any(random & (rows.top_p < 1)), keep_top_p, _first, scaled, rows.top_p)
    scaled = lax.cond(jnp.any(random & (rows.min_p > 0)), keep_min_p, _first, scaled, rows.min_p)
    return jnp.where(random[:, None], scaled, logits)


def sample(logits: jax.Array, rows: SamplingRows, position: jax.Array, seen: jax.Array) -> jax.Array:
    """The next token of each row, int32 `[B]`.

    The noise of a row depends only on its seed, its sample index and `position`, so that its text is the same
    whatever else is in the batch.

    Args:
      logits: float32 `[B, V]`.
      rows: settings.
      position: int32 `[B]`, index in the whole sequence (prompt included) of the token to choose.
      seen: bool `[B, V]`, tokens of the prompt and of the text so far.
    """

    def draw(logits: jax.Array) -> jax.Array:
        seed, index = jnp.asarray(rows.seed), jnp.asarray(rows.sample)
        noise = jax.vmap(_gumbel, (0, 0, 0, None))(seed, index, position, logits.shape[-1])
        return jnp.where((rows.temperature > 0)[:, None], logits + noise, logits)

    logits = filtered(logits.astype(jnp.float32), rows, seen)
    return _argmax(lax.cond(jnp.any(rows.temperature > 0), draw, lambda x: x, logits))


def _argmax(x: jax.Array) -> jax.Array:
    """The first index of the largest value of each row, int32 `[B]`; two plain reductions, which XLA:CPU vectorises."""
    V = x.shape[-1]
    index = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(index, axis=-1)


def _gumbel(seed: jax.Array, sample: jax.Array, position: jax.Array, V: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
    return jax.random.gumbel(key, (V,), jnp.float32)


def _unchanged(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    del seen, penalty
    return logits


def _first(logits: jax.Array, setting: jax.Array) -> jax.Array:
    del setting
    return logits


def _order(x: jax.Array) -> jax.Array:
    """uint32 that compares as the float32 x does."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 + 0 is +0: the two zeros are equal
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _least(order: jax.Array, weight: jax.Array, limit: jax.Array) -> jax.Array:
    """The smallest t with Σ weight[order > t] < limit, uint32 `[B]`: whoever is at least t is kept.

    Bisection over the 32 bits instead of a sort: exact (a rounded sum of non-negative terms cannot grow when terms
    leave it), and the limit may differ from row to row.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(order > middle[:, None], weight, 0), axis=-1)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    B = order.shape[0]
    bounds = jnp.zeros((B,), jnp.uint32), jnp.full((B,), jnp.iinfo(jnp.uint32).max)
    return lax.fori_loop(0, 32, halve, bounds)[1]
