"""MiniMax-M1 once more, in float64 NumPy, one sequence, one token at a time where that is the definition.

Written from the model's specification and sharing no code with the package: the oracle for every configuration that
the golden checkpoint does not cover.
"""

import math
from typing import Any

import numpy as np

from m1jax.config import M1Config

Array = np.ndarray


def slopes(heads: int) -> list[float]:
    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    c = 2 ** math.floor(math.log2(heads))
    return power_of_two(c) + slopes(2 * c)[0::2][: heads - c]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x: Array, rotary: int, theta: float) -> Array:
    """x [T, heads, D]."""
    out = x.copy()
    for t in range(x.shape[0]):
        for c in range(rotary // 2):
            angle = t * theta ** (-2 * c / rotary)
            a, b = x[t, :, c], x[t, :, c + rotary // 2]
            out[t, :, c] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, c + rotary // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def lightning(cfg: M1Config, p: dict[str, Array], i: int, n: int, h: Array) -> tuple[Array, Array]:
    T, (H, D) = len(h), (cfg.num_attention_heads, cfg.head_dim)
    factor = 1 - i / (cfg.num_hidden_layers - 1) + 1e-5
    decay = np.exp(-np.asarray(slopes(H)) * factor)
    qkv = silu(np.einsum("tm,hcdm->thcd", h, p["lightning.qkv_proj"][n]))
    state, out = np.zeros((H, D, D)), np.zeros((T, H, D))
    for t in range(T):
        q, k, v = qkv[t, :, 0], qkv[t, :, 1], qkv[t, :, 2]
        state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
        out[t] = np.einsum("hd,hde->he", q, state)
    normed = rms(out.reshape(T, H * D), p["lightning.norm"][n].reshape(-1), 1e-6)
    gate = sigmoid(h @ p["lightning.output_gate"][n].reshape(H * D, -1).T)
    return (gate * normed) @ p["lightning.out_proj"][n].reshape(-1, H * D).T, state


def attention(cfg: M1Config, p: dict[str, Array], n: int, h: Array) -> Array:
    T, H, K, D = len(h), cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q, k, v = (np.einsum("tm,hdm->thd", h, p[f"softmax.{name}_proj"][n]) for name in "qkv")
    q, k = rope(q, cfg.rotary_dim, cfg.rope_theta), rope(k, cfg.rotary_dim, cfg.rope_theta)
    out = np.zeros((T, H, D))
    for head in range(H):
        kv = head // (H // K)
        for t in range(T):
            weights = softmax(k[: t + 1, kv] @ q[t, head] / math.sqrt(D))
            out[t, head] = weights @ v[: t + 1, kv]
    return out.reshape(T, H * D) @ p["softmax.o_proj"][n].reshape(-1, H * D).T


def moe(cfg: M1Config, p: dict[str, Array], i: int, h: Array) -> Array:
    probability = softmax(h @ p["moe.router"][i].T)
    out = np.zeros_like(h)
    for t, x in enumerate(h):
        best = np.argsort(-probability[t], kind="stable")[: cfg.num_experts_per_tok]
        share = probability[t, best] / probability[t, best].sum()
        for e, s in zip(best, share, strict=True):
            w1, w3 = p["moe.gate_up"][i, e]
            out[t] += s * (p["moe.down"][i, e] @ (silu(w1 @ x) * (w3 @ x)))
    if cfg.shared_intermediate_size:
        gate, up = p["shared.gate_up"][i]
        c = sigmoid(h @ p["shared.coefficient"][i])[:, None]
        out = out * (1 - c) + ((silu(h @ gate.T) * (h @ up.T)) @ p["shared.down"][i].T) * c
    return out


def forward(cfg: M1Config, params: dict[str, Any], tokens: Array) -> tuple[Array, list[Array]]:
    """Logits [T, V] of one sequence, and the state of each lightning layer after it."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = p["embed"][tokens]
    states: list[Array] = []
    softmax_seen = 0
    for i, kind in enumerate(cfg.layer_types):
        h = rms(x, p["block.attn_norm"][i], cfg.rms_norm_eps)
        if kind == "lightning":
            y, state = lightning(cfg, p, i, len(states), h)
            states.append(state)
            alpha, beta = cfg.lightning_alpha, cfg.lightning_beta
        else:
            y = attention(cfg, p, softmax_seen, h)
            softmax_seen += 1
            alpha, beta = cfg.softmax_alpha, cfg.softmax_beta
        x = (h if cfg.postnorm else x) * alpha + y * beta
        h = rms(x, p["block.mlp_norm"][i], cfg.rms_norm_eps)
        x = (h if cfg.postnorm else x) * cfg.mlp_alpha + moe(cfg, p, i, h) * cfg.mlp_beta
    x = rms(x, p["norm"], cfg.rms_norm_eps)
    return x @ p["embed" if cfg.tie_word_embeddings else "lm_head"].T, states
