"""Lightning attention in chunks of C tokens: dense products inside a chunk, the state carried from chunk to chunk.

With i, j positions in a chunk of which the first n are valid, and S the state before it (Lightning Attention-2,
arXiv 2401.04658, algorithm 1):

    o_i = λ^(i+1) q_i S + Σ_{j≤i} λ^(i-j) (q_i·k_j) v_j
    S   = λ^n S + Σ_{j<n} λ^(n-1-j) k_jᵀ v_j
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.isolate import isolated
from m1jax.kernels.rounding import rounded
from m1jax.kernels.segments import valid_and_starts


def step(qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: the recurrence itself, one pass over the state. Shapes as in `chunked` with T = 1."""
    return isolated(_step, jnp.maximum(lengths[0], 0), qkv, log_decay, state, lengths)


def _step(qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k, v = jnp.moveaxis(jax.nn.silu(qkv[:, 0].astype(jnp.float32)), 2, 0)  # [B, H, D]
    # S + (λ-1) S rather than λ S: λ near 1 rounded to float32 would add up to a bias over thousands of tokens.
    decayed = state + jnp.expm1(log_decay)[:, None, None] * state
    new = decayed + k[..., :, None] * v[..., None, :]
    state = jnp.where((lengths > 0)[:, None, None, None], new, state)
    out = jnp.einsum("bhd,bhde->bhe", q, state, precision="highest")
    return rounded(out[:, None], qkv.dtype), state


class Weights(NamedTuple):
    """The powers of λ of one chunk, zero where nothing flows: into the segment of another, from or to padding."""

    inside: jax.Array  # [H, C, C] or [B, H, C, C]: what o_i takes of k_j v_j
    before: jax.Array  # [H, C, 1] or [B, H, C, 1]: what o_i takes of the state before the chunk
    after: jax.Array  # [B, H, C, 1]: what the state after the chunk takes of k_j v_j
    loss: jax.Array  # [B, H, 1, 1]: what it takes of the state before, less 1: a factor near 1 is a rounded number


class Chunk(NamedTuple):
    """What is known of the tokens of one chunk; the optional parts where rows are packed."""

    read: jax.Array  # int32 [B], the first so many tokens are valid, or with segments: hold all that are
    valid: jax.Array | None  # bool [B, C]
    run: jax.Array | None  # int32 [B, C], how many segments have started in the chunk up to and with each token


def chunked(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    lengths: jax.Array,
    chunk: int,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention over any number of tokens; arguments as in `reference.lightning_attention`."""
    T = qkv.shape[1]
    C = min(chunk, T)
    powers = powers_of(log_decay, C)

    def body(s: jax.Array, inputs: tuple[jax.Array, Chunk]) -> tuple[jax.Array, jax.Array]:
        (q, k, v), tokens = inputs  # [B, H, C, D]
        w = weights(log_decay, powers, tokens)
        scores = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest") * w.inside
        out = jnp.einsum("bhij,bhje->bhie", scores, v, precision="highest")
        out += jnp.einsum("bhid,bhde->bhie", q * w.before, s, precision="highest")
        s = s + w.loss * s + jnp.einsum("bhjd,bhje->bhde", k * w.after, v, precision="highest")
        return s, out

    state, out = lax.scan(body, state, (activated(qkv, C), chunks(lengths, segments, T, C)))  # out [n, B, H, C, D]
    return rounded(join(out, T), qkv.dtype), state


def activated(qkv: jax.Array, C: int) -> jax.Array:
    """silu of q, k and v, float32 chunks `[n, 3, B, H, C, D]`.

    For all chunks at once, which uses all cores: XLA:CPU runs what is as small as a chunk on one. And one by one: of
    the three together it makes a pass of its own for the transposition.
    """
    return jnp.stack([split(jax.nn.silu(qkv[..., i, :].astype(jnp.float32)), C) for i in range(3)], axis=1)


def split(x: jax.Array, C: int) -> jax.Array:
    """`[B, T, H, ..., D]` to chunks `[n, ..., B, H, C, D]`, zeros at the end."""
    B, T, H, *middle, D = x.shape
    n = -(-T // C)
    padded = jnp.pad(x, ((0, 0), (0, n * C - T), *((0, 0),) * (x.ndim - 2)))
    split = padded.reshape(B, n, C, H, *middle, D)
    inner = tuple(range(4, split.ndim - 1))
    return split.transpose(1, *inner, 0, 3, 2, split.ndim - 1)


def join(x: jax.Array, T: int) -> jax.Array:
    """The inverse of `split` for T tokens."""
    n, *middle, B, H, C, D = x.shape
    inner = tuple(range(1, 1 + len(middle)))
    b = 1 + len(middle)
    return x.transpose(b, 0, b + 2, b + 1, *inner, b + 3).reshape(B, n * C, H, *middle, D)[:, :T]


def chunks(lengths: jax.Array, segments: jax.Array | None, T: int, C: int) -> Chunk:
    """What is known of every chunk; arrays `[n, ...]`."""
    n = -(-T // C)
    if segments is None:
        return Chunk(jnp.clip(lengths[None] - C * jnp.arange(n)[:, None], 0, C), None, None)
    valid, start = valid_and_starts(lengths, T, segments)

    def by_chunk(x: jax.Array) -> jax.Array:  # [B, T] to [n, B, C]
        return jnp.pad(x, ((0, 0), (0, n * C - T))).reshape(x.shape[0], n, C).swapaxes(0, 1)

    valid, start = by_chunk(valid), by_chunk(start)
    count = jnp.max(jnp.where(valid, 1 + jnp.arange(C), 0), axis=-1)
    return Chunk(count, valid, jnp.cumsum(start, axis=-1, dtype=jnp.int32))


def powers_of(log_decay: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
    """λ^(i-j) for j ≤ i, else 0, `[H, C, C]`, and λ^(i+1), `[H, C, 1]`."""
    position = jnp.arange(C, dtype=jnp.float32)
    age = position[:, None] - position[None]  # [C, C], i - j
    inside = jnp.where(age >= 0, jnp.exp(log_decay[:, None, None] * jnp.maximum(age, 0)), 0.0)
    return inside, jnp.exp(log_decay[:, None] * (position + 1))[..., None]


def weights(log_decay: jax.Array, powers: tuple[jax.Array, jax.Array], chunk: Chunk) -> Weights:
    """The powers of λ for one chunk; `powers` are those that no chunk changes."""
    inside, before = powers
    count = chunk.read
    left = count.astype(jnp.float32)[:, None] - 1 - jnp.arange(inside.shape[1])  # [B, C], tokens still to come
    last, loss = left >= 0, jnp.expm1(log_decay * count[:, None])
    if chunk.valid is not None and chunk.run is not None:
        run = chunk.run
        inside = inside * (run[:, None, :, None] == run[:, None, None, :])
        before = before * (run == 0)[:, None, :, None]
        # Padding starts no segment: the last run holds the last valid token.
        last &= chunk.valid & (run == run[:, -1:])
        loss = jnp.where(run[:, -1:] == 0, loss, -1.0)
    after = jnp.where(last, 1.0, 0.0)[:, None] * jnp.exp(log_decay[:, None] * jnp.maximum(left, 0)[:, None])
    return Weights(inside, before, after[..., None], loss[..., None, None])
