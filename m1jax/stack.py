"""The layers of M1 one after the other: a scan over the repeating period of their kinds.

Inside a period it is a scan over each run of equal layers, which picks a layer's weights by index, so that a model of
80 layers traces and compiles in the time of two. Letters as in `m1jax.model`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax import layers
from m1jax.config import LIGHTNING, M1Config
from m1jax.kernels.lightning_attention import log_decay
from m1jax.kernels.rounding import in_float32
from m1jax.kernels.segments import positions
from m1jax.sharding.region import block, gathered, start, ways

if TYPE_CHECKING:
    from m1jax.model import M1


class Carry(NamedTuple):
    """What goes from layer to layer; the optional parts are absent where nobody asks for them."""

    x: jax.Array  # [B, T, M]
    s: jax.Array | None  # LightningState.s
    k: jax.Array | None  # KVCache.k
    v: jax.Array | None  # KVCache.v
    hidden: jax.Array | None  # Trace.hidden
    router_logits: jax.Array | None  # Trace.router_logits
    bad: jax.Array | None = None  # int32 [L], 1 where a layer's output is not finite
    routes: jax.Array | None = None  # integers [L, B, T, k], the experts chosen


class Inputs(NamedTuple):
    """Of what a layer's output is made once states, keys and values are: no token needs another's part."""

    x: jax.Array | None  # [B, T, M], the layer's input where it is what is added to
    h: jax.Array  # [B, T, M], the same after the norm
    y: jax.Array | None  # [B, T, M] of lightning attention
    valid: jax.Array  # bool [B, T]
    rope: tuple[jax.Array, jax.Array]


class Run(NamedTuple):
    """Consecutive layers of one kind: the first's index among all layers and among its kind, and how many."""

    kind: str
    layer: int
    among_kind: int
    layers: int


def period(kinds: tuple[str, ...]) -> int:
    """The smallest p such that `kinds` is its first p entries again and again."""
    n = len(kinds)
    return next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))


def runs(kinds: tuple[str, ...]) -> list[Run]:
    """Splits layer types into runs of equal ones."""
    out: list[Run] = []
    seen = dict.fromkeys(kinds, 0)
    layer = 0
    for kind, group in itertools.groupby(kinds):
        count = len(list(group))
        out.append(Run(kind, layer, seen[kind], count))
        seen[kind] += count
        layer += count
    return out


def body(
    model: "M1",
    carry: Carry,
    tokens_seen: jax.Array,
    lengths: jax.Array,
    decays: jax.Array | None = None,
    segments: jax.Array | None = None,
    capacity: float | None = None,
    last_only: bool = False,
    routes: jax.Array | None = None,
    recurrent: bool = False,
    pages: jax.Array | None = None,
    parameters: tuple[jax.Array | int, jax.Array | int] = (0, 0),
) -> Carry:
    """All layers; `tokens_seen` int32 `[B]` is the position of the first token, `lengths` int32 `[B]` as in `step`.

    `decays` float32 `[L, H]` is log λ where the layers are a part of a larger model, whose numbering counts.
    `segments` int32 `[B, T]` as in `M1.__call__`, where nothing was read before. `capacity` as in `layers.MoE`,
    and `routes` `[L, B, T, k]`: its `route` in every layer. `recurrent` as in `M1.step`, `pages`
    as in `M1State`. `parameters` is where those of the first layer lie in the stacks of all layers, and of its kind.
    With `last_only`, which goes with caches alone, the output is undefined but for each row's last valid token: of the
    last layer the states, keys and values of all tokens are made, the rest for that one.
    """
    alone = segments is None and capacity is None and routes is None
    asked = (carry.hidden, carry.router_logits, carry.bad, carry.routes)
    assert not last_only or (alone and carry.k is not None and all(x is None for x in asked))
    cfg = model.config
    p = period(cfg.layer_types)
    one_period = runs(cfg.layer_types[:p])
    per_period = {kind: cfg.layer_types[:p].count(kind) for kind in cfg.layer_types}
    L = cfg.num_hidden_layers
    if decays is None:
        decays = block(all_decays(cfg), 1, "heads")
    T = carry.x.shape[1]
    first = start("sequence", T)  # of this device's tokens
    lengths = jnp.clip(lengths - first, 0, T)
    own = valid = jnp.arange(T) < lengths[:, None]  # [B, T]
    position = tokens_seen[:, None] + first + jnp.arange(T)
    if segments is not None:
        valid &= segments > 0
        position = block(positions(gathered(segments, 1, "sequence")), 1, "sequence")
    rope = layers.rope_angles(cfg, position)
    at = jnp.maximum(lengths - 1, 0)
    last_only = last_only and T > 1 and ways("sequence") == 1

    def layer(run: Run, carry: Carry, i: jax.Array, n: jax.Array) -> Carry:
        own_i, n = i + parameters[0], n + parameters[1]
        h = layers.rms_norm(carry.x, model.block.attn_norm[...][own_i], cfg.rms_norm_eps)
        y, attend = None, None
        if run.kind == LIGHTNING:
            y, s = model.lightning(h, n, decays[i], carry.s, lengths, segments, recurrent)
            carry = carry._replace(s=s)
        else:
            keys_values = model.softmax.keys_values(h, n, rope, carry.k, carry.v, tokens_seen, pages)
            given = {"keys_values": keys_values, "segments": segments, "pages": pages, "recurrent": recurrent}
            attend = functools.partial(model.softmax.attend, n=n, **given)
            if carry.k is not None:
                carry = carry._replace(k=keys_values[0], v=keys_values[1])
        rest = functools.partial(_rest, model, own_i, capacity, None if routes is None else routes[i], attend)
        inputs = Inputs(None if cfg.postnorm else carry.x, h, y, valid, rope)
        if last_only and run is one_period[-1]:
            of_last = functools.partial(_only_at, at, rest)
            x = lax.cond(i < L - 1, lambda *given: rest(*given)[0], of_last, inputs, tokens_seen)
            return carry._replace(x=x)
        x, logits, chosen = rest(inputs, tokens_seen)
        return _noted(carry, i, x, logits, chosen, own)._replace(x=x)

    def run_layers(run: Run, carry: Carry, i: jax.Array, n: jax.Array) -> Carry:
        if run.layers == 1:
            return layer(run, carry, i, n)
        return lax.scan(lambda c, j: (layer(run, c, i + j, n + j), None), carry, jnp.arange(run.layers))[0]

    def one(carry: Carry, c: jax.Array) -> tuple[Carry, None]:
        for run in one_period:
            carry = run_layers(run, carry, c * p + run.layer, c * per_period[run.kind] + run.among_kind)
        return carry, None

    carry, _ = lax.scan(one, carry, jnp.arange(L // p))
    return carry


def _noted(carry: Carry, i: jax.Array, x: jax.Array, logits: jax.Array, chosen: jax.Array, own: jax.Array) -> Carry:
    """What is asked for of layer i with output x `[B, T, M]`, router logits `[B, T, E]` and choice `[B, T, k]`."""
    if carry.hidden is not None:
        carry = carry._replace(hidden=carry.hidden.at[i].set(x))
    if carry.router_logits is not None:
        carry = carry._replace(router_logits=carry.router_logits.at[i].set(logits))
    if carry.routes is not None:
        carry = carry._replace(routes=carry.routes.at[i].set(chosen.astype(carry.routes.dtype)))
    if carry.bad is not None:
        carry = carry._replace(bad=carry.bad.at[i].set(not_finite(x, own)))
    return carry


def all_decays(config: M1Config) -> jax.Array:
    """log λ of every layer and head, float32 `[L, H]`; read for lightning layers only."""
    H, L = config.num_attention_heads, config.num_hidden_layers
    return jnp.asarray([log_decay(H, i, L) for i in range(L)])


def _rest(
    model: "M1",
    i: jax.Array,
    capacity: float | None,
    route: jax.Array | None,
    attend: Callable[..., jax.Array] | None,
    inputs: Inputs,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output `[B, T, M]` of layer i, its router logits and the experts chosen, as `layers.MoE` returns them.

    `attend` gives the y of softmax attention, for tokens whose positions go from `first` int32 `[B]` on.
    """
    cfg = model.config
    x, h, y, valid, rope = inputs
    alpha, beta = cfg.lightning_alpha, cfg.lightning_beta
    if attend is not None:
        y = attend(h, rope=rope, first=first)
        alpha, beta = cfg.softmax_alpha, cfg.softmax_beta
    assert y is not None
    x = _residual(h if x is None else x, y, alpha, beta)
    h = layers.rms_norm(x, model.block.mlp_norm[...][i], cfg.rms_norm_eps)
    y, logits, chosen = model.moe(h, i, valid, cfg.num_experts_per_tok, capacity, route)
    if model.shared is not None:
        y = model.shared(h, i, y)
    return _residual(h if cfg.postnorm else x, y, cfg.mlp_alpha, cfg.mlp_beta), logits, chosen


def _only_at(
    at: jax.Array, rest: Callable[[Inputs, jax.Array], tuple[jax.Array, ...]], inputs: Inputs, first: jax.Array
) -> jax.Array:
    """Output `[B, T, M]` of a layer at the token `at` `[B]` of each row, anything elsewhere."""
    x, *_ = rest(jax.tree.map(lambda x: token_at(x, at), inputs), first + at)
    return inputs.h.at[jnp.arange(x.shape[0]), at].set(x[:, 0])


def token_at(x: jax.Array, at: jax.Array) -> jax.Array:
    """Of x `[B, T, ...]` the token `at` `[B]` of each row, `[B, 1, ...]`."""
    return jnp.take_along_axis(x, at.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _residual(x: jax.Array, y: jax.Array, alpha: float, beta: float) -> jax.Array:
    # The factors are float32 numbers: bfloat16 would make 3.5625 of M1's 3.5566.
    return in_float32(lambda x, y: x * alpha + y * beta, x, y)


def not_finite(x: jax.Array, own: jax.Array) -> jax.Array:
    """1 if x `[..., M]` has NaN or infinity at a token that is `own`, bool `[...]`; else 0, int32."""
    return jnp.any(~jnp.isfinite(x) & own[..., None]).astype(jnp.int32)
