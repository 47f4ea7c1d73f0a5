"""The sublayers of M1: every module holds the stacked weights of all layers of its kind and is called with an index.

Letters as in `m1jax.model`. Products, and what is done element by element between two of them, are computed in
float32 and rounded once to the compute dtype; norms, router and lightning state are float32 throughout.

On a mesh every device calls them with its own block of everything: B, T, H, K, F and the experts are then its share.
What needs the others' is said by the logical axis that it is summed or gathered over.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from m1jax.config import M1Config
from m1jax.kernels.isolate import by_row
from m1jax.kernels.linear import linear
from m1jax.kernels.rounding import in_float32, rounded
from m1jax.lora import adapted
from m1jax.sharding.capacity import within_capacity
from m1jax.sharding.experts import experts
from m1jax.sharding.region import matrix, size_of, split_over, total
from m1jax.sharding.sequence import append, lightning_attention, softmax_attention

MANY = 8192  # numbers, from which on XLA:CPU sums them in one way, however many more there are
ROUTED = 64  # tokens that choose their experts at once, on a CPU in bfloat16
LIGHTNING_NORM_EPS = 1e-6  # the norm inside lightning attention does not follow rms_norm_eps


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, axis: str = "channel") -> jax.Array:
    """x / rms(x) · weight over the last dimension: statistics in float32, rounded to the dtype of x before the weight.

    `axis` is the logical axis by which the channels are split, if they are.
    """
    wide = x.astype(jnp.float32)
    mean = total(_mean_of_squares(x), axis) / size_of(split_over(axis))
    return in_float32(operator.mul, rounded(wide * jax.lax.rsqrt(mean + eps), x.dtype), weight)


def _mean_of_squares(x: jax.Array) -> jax.Array:
    """Over the last dimension, which stays, in float32: of bfloat16 the same, bit by bit, of few rows as of many."""

    def mean(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return jnp.mean(wide * wide, axis=-1, keepdims=True)

    if x.dtype == jnp.float32:
        return mean(x)
    flat = x.reshape(-1, x.shape[-1])
    N, M = flat.shape
    alone = functools.partial(by_row, mean, rows=max(N, -(-MANY // M)))  # all at once
    # The gradient keeps x as it is, not in float32.
    return jax.checkpoint(alone, prevent_cse=False)(flat).reshape(*x.shape[:-1], 1)


def project(x: jax.Array, stack: nnx.Param, index: jax.Array) -> jax.Array:
    """x `[B, T, ...in]` times one layer of a stack `[n, ...out, ...in]`, in the dtype of x: `[B, T, out]` flat."""
    B, T = x.shape[:2]
    out = adapted.product(x.reshape(B * T, -1), *matrix(stack, index))
    return checkpoint_name(rounded(out, x.dtype).reshape(B, T, -1), "projection")


def rope_angles(config: M1Config, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, T, 1, R/2]`, of positions int32 `[B, T]`."""
    R = config.rotary_dim
    exponent = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
    frequency = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    angle = position.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoPE on the first R of the D channels of x `[B, T, heads, D]`: channel c turns with channel c + R/2.

    As in the official code cos and sin stay float32: bfloat16's error in them would be as large as that of x.
    """
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first = in_float32(lambda a, b, cos, sin: a * cos - b * sin, a, b, cos, sin, dtype=x.dtype)
    second = in_float32(lambda a, b, cos, sin: b * cos + a * sin, a, b, cos, sin, dtype=x.dtype)
    return jnp.concatenate([first, second, rest], axis=-1)


@nnx.dataclass
class Lightning(nnx.Module):
    """Lightning attention with its norm over all heads and its output gate."""

    qkv_proj: nnx.Param  # [P, H, 3, D, M]
    output_gate: nnx.Param  # [P, H, D, M]
    norm: nnx.Param  # [P, H, D]
    out_proj: nnx.Param  # [P, M, H, D]

    def __call__(
        self,
        x: jax.Array,
        n: jax.Array,
        log_decay: jax.Array,
        states: jax.Array | None,
        lengths: jax.Array,
        segments: jax.Array | None,
        recurrent: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """x `[B, T, M]`, states float32 `[P, B, H, D, D]` or None; returns y `[B, T, M]` and the new states.

        All layers' states go in, so that a GPU's kernel replaces the layer's in place. `recurrent` as in `M1.step`.
        """
        B, T, _ = x.shape
        H, _, D = self.qkv_proj[...].shape[1:4]
        qkv = project(x, self.qkv_proj, n).reshape(B, T, H, 3, D)
        layer = None if states is None else n
        out, new = lightning_attention(
            qkv, log_decay, state=states, lengths=lengths, segments=segments, layer=layer, recurrent=recurrent
        )
        normed = rms_norm(out.reshape(B, T, H * D), self.norm[...][n].reshape(H * D), LIGHTNING_NORM_EPS, "heads")
        gate = project(x, self.output_gate, n)
        y = project(in_float32(lambda gate, out: jax.nn.sigmoid(gate) * out, gate, normed), self.out_proj, n)
        return total(y, "heads"), None if states is None else new


@nnx.dataclass
class Softmax(nnx.Module):
    """Grouped-query softmax attention with partial RoPE."""

    q_proj: nnx.Param  # [S, H, D, M]
    k_proj: nnx.Param  # [S, K, D, M]
    v_proj: nnx.Param  # [S, K, D, M]
    o_proj: nnx.Param  # [S, M, H, D]

    def keys_values(
        self,
        x: jax.Array,
        n: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache_k: jax.Array | None,
        cache_v: jax.Array | None,
        first: jax.Array,
        pages: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x `[B, T, M]`: `[B, K, T, D]`, or the caches with these in them, as `KVCache` has them."""
        B, T, _ = x.shape
        K, D = self.k_proj[...].shape[1:3]
        k = rotate(project(x, self.k_proj, n).reshape(B, T, K, D), rope).swapaxes(1, 2)
        v = project(x, self.v_proj, n).reshape(B, T, K, D).swapaxes(1, 2)
        if cache_k is None or cache_v is None:
            return k, v
        return append((cache_k, cache_v), (k, v), n, first, pages)

    def attend(
        self,
        x: jax.Array,
        n: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        keys_values: tuple[jax.Array, jax.Array],
        first: jax.Array,
        segments: jax.Array | None,
        pages: jax.Array | None,
        recurrent: bool = False,
    ) -> jax.Array:
        """y `[B, T, M]` of x `[B, T, M]`, with positions from `first` int32 `[B]` on; `segments` go without caches.

        `recurrent` as in `M1.step`.
        """
        B, T, _ = x.shape
        H, D = self.q_proj[...].shape[1:3]
        q = rotate(project(x, self.q_proj, n).reshape(B, T, H, D), rope)
        k, v = keys_values
        if k.ndim == 4:
            out = softmax_attention(q, k, v, segments=segments, recurrent=recurrent)
        else:
            out = softmax_attention(q, k, v, offset=first, layer=n, pages=pages, recurrent=recurrent)
        return total(project(out, self.o_proj, n), "heads")


def choose(logits: jax.Array, k: int, dtype: DTypeLike, chosen: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights float32 `[N, k]` and numbers of the experts of router logits `[N, E]`: the best k, or those given.

    Where experts compute in bfloat16, as `dtype` says, the weights of a token do not hang on how many there are.
    """

    def one(logits: jax.Array, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = jax.nn.softmax(logits, axis=-1)
        weights, chosen = (jnp.take_along_axis(p, *given, axis=-1), *given) if given else jax.lax.top_k(p, k)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen

    given = () if chosen is None else (chosen,)
    return one(logits, *given) if dtype == jnp.float32 else by_row(one, logits, *given, rows=ROUTED)


@nnx.dataclass
class MoE(nnx.Module):
    """Sparse mixture of SwiGLU experts: softmax over all experts, the best k, their weights renormalised to sum 1."""

    router: nnx.Param  # float32 [L, E, M]
    gate_up: nnx.Param  # [L, E, 2, F, M], or `Quantized`
    down: nnx.Param  # [L, E, M, F], or `Quantized`

    def __call__(
        self,
        x: jax.Array,
        i: jax.Array,
        valid: jax.Array,
        k: int,
        capacity: float | None,
        route: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x `[B, T, M]`, valid bool `[B, T]`; returns y `[B, T, M]`, router logits float32 `[B, T, E]` and the choice.

        The choice is int32 `[B, T, k]`, of padding too. A `route`, integers `[B, T, k]`, takes its place, not that of
        its weights. With a `capacity` experts take no more tokens than `within_capacity` allows; else none is dropped.
        """
        B, T, M = x.shape
        flat = x.reshape(B * T, M)
        logits = linear(flat.astype(jnp.float32), self.router[...], i)
        E = logits.shape[-1]
        weights, chosen = choose(logits, k, x.dtype, None if route is None else route.reshape(-1, k).astype(jnp.int32))
        taken = jnp.where(valid.reshape(-1, 1), chosen, E)  # padding goes to nobody
        if capacity is not None:
            taken = within_capacity(taken.reshape(B, T, k), E, capacity).reshape(B * T, k)
        (gate_up, layer), (down, _) = matrix(self.gate_up, i), matrix(self.down, i)
        y = experts(flat, gate_up, down, taken, weights, layer=layer)
        return y.reshape(B, T, M), logits.reshape(B, T, E), chosen.reshape(B, T, k)


@nnx.dataclass
class SharedExpert(nnx.Module):
    """The shared expert of the Text-01 family: y (1 - c) + shared(x) c with c = sigmoid(x · coefficient) in float32."""

    gate_up: nnx.Param  # [L, 2, I, M]
    down: nnx.Param  # [L, M, I]
    coefficient: nnx.Param  # float32 [L, M]

    def __call__(self, x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        """x, y `[B, T, M]`, y from the routed experts."""
        gate, up = jnp.split(project(x, self.gate_up, i), 2, axis=-1)
        active = in_float32(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        shared = total(project(active, self.down, i), "shared_width")
        c = jax.nn.sigmoid(jnp.sum(x.astype(jnp.float32) * self.coefficient[...][i], axis=-1, keepdims=True))
        return rounded(y.astype(jnp.float32) * (1 - c) + shared.astype(jnp.float32) * c, x.dtype)
