"""The device's side of text generation: what a batch keeps between steps, and the compiled functions over it.

Letters: B batch rows, T tokens of a chunk, N cache length, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from m1jax.model import M1
from m1jax.sampling import SamplingRows, sample
from m1jax.sharding.region import after, everywhere, laid_out
from m1jax.state import KVCache, M1State, take_rows

NOT_A_NUMBER = -1  # stands for a token where the logits were not finite
FREE = -1  # stands for a forced token where none is forced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch between two steps.

    `token` int32 `[B]` was chosen last and is not yet in `state`; `seen` bool `[B, V]` marks the tokens of each prompt
    and text so far.
    """

    state: M1State
    token: jax.Array
    seen: jax.Array
    sampling: SamplingRows


@functools.partial(jax.jit, donate_argnames=("state", "logits"))
def prefill(
    model: M1, tokens: jax.Array, lengths: jax.Array, state: M1State, logits: jax.Array
) -> tuple[jax.Array, M1State]:
    """Reads a chunk `[B, T]` of each prompt; a row with nothing left (length 0) keeps its state and logits `[B, V]`."""
    new, state = model.step(tokens, state, lengths=lengths, logits="last")
    return jnp.where(lengths[:, None] > 0, new, logits), state


@functools.partial(jax.jit, static_argnames="N")
def pick(reads: tuple[tuple[jax.Array, M1State], ...], source: jax.Array, N: int) -> tuple[jax.Array, M1State]:
    """Logits `[B, V]` and state of the given rows of all prefills one after the other, with room for N tokens."""
    logits, states = zip(*reads, strict=True)
    logits = jnp.concatenate(logits)[source]
    return logits, take_rows([grow(state, N) for state in states], after(source, logits))


@functools.partial(jax.jit, donate_argnames="state")
def begin(
    logits: jax.Array, state: M1State, seen: jax.Array, sampling: SamplingRows, forced: jax.Array
) -> tuple[jax.Array, Rows]:
    """A batch that continues a prefill, and the first token of each row."""
    token = jnp.zeros(logits.shape[:1], jnp.int32)
    return _choose(logits, Rows(state, token, seen, sampling), forced)


@functools.partial(jax.jit, donate_argnames="rows")
def decode(model: M1, rows: Rows, active: jax.Array, forced: jax.Array) -> tuple[jax.Array, Rows]:
    """Feeds each active row's last token and chooses the next.

    Args:
      model: the model.
      rows: the batch.
      active: bool `[B]`; the state of other rows stays as it is.
      forced: int32 `[B]`, the token to take instead of a sampled one, or `FREE`.

    Returns:
      The tokens int32 `[B]`, `NOT_A_NUMBER` where logits were not finite, and the batch.
    """
    logits, state = model.step(rows.token[:, None], rows.state, lengths=active.astype(jnp.int32), logits="last")
    return _choose(logits, dataclasses.replace(rows, state=state), forced)


def _choose(logits: jax.Array, rows: Rows, forced: jax.Array) -> tuple[jax.Array, Rows]:
    token = sample(logits, rows.sampling, rows.state.length, rows.seen)
    token = jnp.where(forced == FREE, token, forced)
    seen = rows.seen.at[jnp.arange(token.shape[0]), token].set(True)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return everywhere(jnp.where(finite, token, NOT_A_NUMBER)), dataclasses.replace(rows, token=token, seen=seen)


@jax.jit
def join(batches: tuple[Rows, ...], source: jax.Array) -> Rows:
    """A batch of the given rows `[B]` of all batches one after the other; their caches have one length."""

    def joined(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays)[source]

    rest = [jax.tree.map(joined, *parts) for parts in zip(*map(_parts, batches), strict=True)]
    return Rows(take_rows([rows.state for rows in batches], after(source, *jax.tree.leaves(rest))), *rest)


def _parts(rows: Rows) -> tuple[jax.Array, jax.Array, SamplingRows]:
    return rows.token, rows.seen, rows.sampling


@functools.partial(jax.jit, static_argnames="N")
def grow(state: M1State, N: int) -> M1State:
    """The same state with room for N tokens, no fewer than it has read."""

    def longer(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :, :, :N], ((0, 0), (0, 0), (0, 0), (0, max(0, N - x.shape[3])), (0, 0)))

    return dataclasses.replace(state, cache=KVCache(longer(state.cache.k), longer(state.cache.v)))


@functools.partial(jax.jit, static_argnames=("B", "N"))
def empty(model: M1, B: int, N: int) -> tuple[jax.Array, M1State]:
    """Logits `[B, V]` and state before the first token, where a step leaves its own: else it would compile again."""
    logits = laid_out(jnp.zeros((B, model.config.vocab_size), jnp.float32), "logits", ("batch", "vocab"))
    return logits, model.init_state(batch=B, max_length=N)
