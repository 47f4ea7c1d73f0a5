"""The gradient of chunked lightning attention: two sweeps over the chunks, no state of any chunk is stored.

With P the weights inside a chunk, S the state before it and G the gradient of the state after it (names as in
`xla.Weights`; Lightning Attention-2, arXiv 2401.04658, algorithm 2):

    forward sweep (S):    dq_i += before_i dO_i Sᵀ
    backward sweep (G):   dq_i += Σ_j P_ij (dO_i·v_j) k_j       dk_j = Σ_i P_ij (dO_i·v_j) q_i + after_j v_j Gᵀ
                          dv_j = Σ_i P_ij (q_i·k_j) dO_i + after_j k_j G
                          G = G + loss G + Σ_i before_i q_iᵀ dO_i
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.lightning_attention import xla

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def chunked(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    lengths: jax.Array,
    chunk: int,
    segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`xla.chunked` with a gradient to `qkv` and `state`; none to `log_decay`."""
    return _chunked(qkv, log_decay, state, lengths, segments, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    return xla.chunked(qkv, log_decay, state, lengths, chunk, segments)


def _fwd(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None,
    chunk: int,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    out = xla.chunked(qkv, log_decay, state, lengths, chunk, segments)
    return out, (qkv, log_decay, state, lengths, segments)


def _bwd(
    chunk: int, residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None, jax.Array, None, None]:
    qkv, log_decay, state, lengths, segments = residuals
    d_out, d_state = cotangents
    T = qkv.shape[1]
    C = min(chunk, T)
    powers = xla.powers_of(log_decay, C)
    tokens = xla.chunks(lengths, segments, T, C)
    qkv_chunks = xla.activated(qkv, C)
    d_o = xla.split(d_out.astype(jnp.float32), C)  # [n, B, H, C, D]

    def from_state(s: jax.Array, inputs: tuple[jax.Array, jax.Array, xla.Chunk]) -> tuple[jax.Array, jax.Array]:
        (_, k, v), d_o, tokens = inputs
        w = xla.weights(log_decay, powers, tokens)
        d_q = w.before * jnp.einsum("bhie,bhde->bhid", d_o, s, precision="highest")
        s = s + w.loss * s + jnp.einsum("bhjd,bhje->bhde", k * w.after, v, precision="highest")
        return s, d_q

    def rest(g: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array, xla.Chunk]) -> tuple[jax.Array, jax.Array]:
        (q, k, v), d_o, d_q, tokens = inputs
        w = xla.weights(log_decay, powers, tokens)
        scores = jnp.einsum("bhid,bhjd->bhij", q, k, precision="highest") * w.inside
        d_scores = jnp.einsum("bhie,bhje->bhij", d_o, v, precision="highest") * w.inside
        d_q += jnp.einsum("bhij,bhjd->bhid", d_scores, k, precision="highest")
        d_k = jnp.einsum("bhij,bhid->bhjd", d_scores, q, precision="highest")
        d_k += w.after * jnp.einsum("bhje,bhde->bhjd", v, g, precision="highest")
        d_v = jnp.einsum("bhij,bhie->bhje", scores, d_o, precision="highest")
        d_v += w.after * jnp.einsum("bhjd,bhde->bhje", k, g, precision="highest")
        g = g + w.loss * g + jnp.einsum("bhid,bhie->bhde", q * w.before, d_o, precision="highest")
        return g, jnp.stack([d_q, d_k, d_v])

    _, d_q = lax.scan(from_state, state, (qkv_chunks, d_o, tokens))
    d_state, d_activated = lax.scan(rest, d_state, (qkv_chunks, d_o, d_q, tokens), reverse=True)
    _, through_silu = jax.vjp(jax.nn.silu, qkv.astype(jnp.float32))
    (d_qkv,) = through_silu(xla.join(d_activated, T))
    return d_qkv.astype(qkv.dtype), None, d_state, None, None


_chunked.defvjp(_fwd, _bwd)
