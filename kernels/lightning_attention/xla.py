"""Lightning attention in chunks of C tokens: dense products inside a chunk, the state carried from chunk to chunk.

With i, j positions in a chunk of which the first n are valid, and S the state before it (Lightning Attention-2,
arXiv 2401.04658, algorithm 1):

    o_i = λ^(i+1) q_i S + Σ_{j≤i} λ^(i-j) (q_i·k_j) v_j
    S   = λ^n S + Σ_{j<n} λ^(n-1-j) k_jᵀ v_j
"""

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.isolate import isolated


def step(qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: the recurrence itself, one pass over the state. Shapes as in `chunked` with T = 1."""
    return isolated(_step, lengths[0], qkv, log_decay, state, lengths)


def _step(qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k, v = jnp.moveaxis(jax.nn.silu(qkv[:, 0].astype(jnp.float32)), 2, 0)  # [B, H, D]
    # S + (λ-1) S rather than λ S: λ near 1 rounded to float32 would add up to a bias over thousands of tokens.
    decayed = state + jnp.expm1(log_decay)[:, None, None] * state
    new = decayed + k[..., :, None] * v[..., None, :]
    state = jnp.where((lengths > 0)[:, None, None, None], new, state)
    out = jnp.einsum("bhd,bhde->bhe", q, state, precision="highest")
    return out[:, None].astype(qkv.dtype), state


def chunked(
    qkv: jax.Array, log_decay: jax.Array, state: jax.Array, lengths: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention over any number of tokens; arguments as in `reference.lightning_attention`."""
    B, T, H, _, D = qkv.shape
    C = min(chunk, T)
    n = -(-T // C)
    padded = jnp.pad(qkv, ((0, 0), (0, n * C - T), (0, 0), (0, 0), (0, 0)))
    chunks = padded.reshape(B, n, C, H, 3, D).transpose(1, 4, 0, 3, 2, 5)  # [n, 3, B, H, C, D]
    valid = jnp.clip(lengths[None] - C * jnp.arange(n)[:, None], 0, C)  # [n, B]

    position = jnp.arange(C, dtype=jnp.float32)
    age = position[:, None] - position[None]  # [C, C], i - j
    inside = jnp.where(age >= 0, jnp.exp(log_decay[:, None, None] * jnp.maximum(age, 0)), 0.0)  # [H, C, C]
    before = jnp.exp(log_decay[:, None] * (position + 1))[..., None]  # [H, C, 1]

    def body(s: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        raw, count = inputs
        q, k, v = jax.nn.silu(raw.astype(jnp.float32))  # [B, H, C, D]
        scores = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest") * inside
        out = jnp.einsum("bhij,bhje->bhie", scores, v, precision="highest")
        out += jnp.einsum("bhid,bhde->bhie", q * before, s, precision="highest")
        left = count.astype(jnp.float32)[:, None] - 1 - position  # [B, C], tokens of the chunk still to come
        weight = jnp.where(left >= 0, 1.0, 0.0)[:, None] * jnp.exp(log_decay[:, None] * jnp.maximum(left, 0)[:, None])
        s = jnp.exp(log_decay * count[:, None])[..., None, None] * s
        s += jnp.einsum("bhjd,bhje->bhde", k * weight[..., None], v, precision="highest")
        return s, out.astype(qkv.dtype)

    state, out = lax.scan(body, state, (chunks, valid))  # out [n, B, H, C, D]
    return out.transpose(1, 0, 3, 2, 4).reshape(B, n * C, H, D)[:, :T], state
