"""Decode steps of the models that the M1 paper compares with, for counting FLOPs: shapes are right, values are not.

Configurations from the models' published `config.json`; the matrices of one step, normalisation and scales left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def weights(*shape: int) -> jax.Array:
    """A matrix that is only counted."""
    return jnp.zeros(shape, jnp.bfloat16)


def swiglu(x: jax.Array, experts: int, width: int) -> jax.Array:
    """x `[M]` through so many experts of which each has the given width."""
    gate, up = jnp.einsum("m,cefm->cef", x, weights(2, experts, width, x.shape[0]))
    return jnp.einsum("ef,efm->m", jax.nn.silu(gate) * up, weights(experts, width, x.shape[0]))


def grouped_attention(x: jax.Array, N: int, H: int, K: int, D: int) -> jax.Array:
    """Grouped-query attention of one token x `[M]` over N positions."""
    q, k, v = (jnp.einsum("m,mhd->hd", x, weights(x.shape[0], heads, D)) for heads in (H, K, K))
    cache = jnp.broadcast_to(k, (N, K, D)), jnp.broadcast_to(v, (N, K, D))
    p = jax.nn.softmax(jnp.einsum("kgd,nkd->kgn", q.reshape(K, H // K, D), cache[0]))
    return jnp.einsum("hd,hdm->m", jnp.einsum("kgn,nkd->kgd", p, cache[1]).reshape(H, D), weights(H, D, x.shape[0]))


def latent_attention(x: jax.Array, N: int, latent: bool) -> jax.Array:
    """DeepSeek's multi-head latent attention (arXiv 2405.04434) of one token x `[M]` over N positions."""
    M, H, D, R, Q, C = x.shape[0], 128, 128, 64, 1536, 512
    q = jnp.einsum("q,qhd->hd", weights(M, Q).T @ x, weights(Q, H, D + R))
    compressed, rotary = jnp.split(weights(C + R, M) @ x, [C])
    if latent:
        query = jnp.concatenate([jnp.einsum("hd,hdc->hc", q[:, :D], weights(H, D, C)), q[:, D:]], axis=1)
        keys = jnp.broadcast_to(jnp.concatenate([compressed, rotary]), (N, C + R))
        p = jax.nn.softmax(jnp.einsum("hc,nc->hn", query, keys))
        out = jnp.einsum("hc,hcd->hd", jnp.einsum("hn,nc->hc", p, keys[:, :C]), weights(H, C, D))
    else:
        k, v = jnp.einsum("c,schd->shd", compressed, weights(2, C, H, D))
        key = jnp.concatenate([k, jnp.broadcast_to(rotary, (H, R))], axis=1)
        p = jax.nn.softmax(jnp.einsum("hd,nhd->hn", q, jnp.broadcast_to(key, (N, H, D + R))))
        out = jnp.einsum("hn,nhd->hd", p, jnp.broadcast_to(v, (N, H, D)))
    return jnp.einsum("hd,hdm->m", out, weights(H, D, M))


def repeat(layer: Callable[[jax.Array], jax.Array], x: jax.Array, layers: int) -> jax.Array:
    """x through so many equal layers."""
    return lax.scan(lambda x, _: (x + layer(x), None), x, length=layers)[0]


def deepseek_r1(N: int, latent: bool) -> jax.Array:
    """One step of DeepSeek-R1: 61 layers, 3 dense, then 8 of 256 experts and a shared one."""

    def sparse(x: jax.Array) -> jax.Array:
        y = latent_attention(x, N, latent)
        return swiglu(y, 8 + 1, 2048) + jnp.sum(weights(256, 7168) @ y)

    x = repeat(lambda x: swiglu(latent_attention(x, N, latent), 1, 18432), weights(7168), 3)
    return weights(129280, 7168) @ repeat(sparse, x, 58)


def qwen3(N: int) -> jax.Array:
    """One step of Qwen3-235B-A22B: 94 layers, 8 of 128 experts."""

    def layer(x: jax.Array) -> jax.Array:
        y = grouped_attention(x, N, 64, 4, 128)
        return swiglu(y, 8, 1536) + jnp.sum(weights(128, 4096) @ y)

    return weights(151936, 4096) @ repeat(layer, weights(4096), 94)
