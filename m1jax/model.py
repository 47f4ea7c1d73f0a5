"""MiniMax-M1 as NNX modules used as immutable pytrees: `(tokens, state) -> (logits, state)`, nothing mutated.

All layers of one kind lie stacked in one array; `m1jax.stack` goes through them.

Letters: B batch, T tokens, N cache length, L layers (P lightning, S softmax), H heads, K key/value heads, D head_dim,
M hidden, E experts, F expert width, V vocabulary, R rotary_dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from m1jax import layers
from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.kernels.experts import Quantization
from m1jax.kernels.linear import linear
from m1jax.params import ParamSpec, join_quantized, nest, param_table
from m1jax.sharding.region import (
    after,
    lookup,
    on_mesh,
    on_mesh_of,
    start,
    total,
    ways,
    whole,
)
from m1jax.stack import Carry, body, not_finite, token_at
from m1jax.state import STATE, KVCache, LightningState, M1State, empty

Logits = Literal["all", "last"]
Method = TypeVar("Method", bound=Callable[..., Any])

MOST_LOGITS = 1 << 24  # that exist at a time where they are only looked at


class Trace(NamedTuple):
    """Inner values of a forward pass, for tests and research."""

    embedding: jax.Array  # [B, T, M]
    hidden: jax.Array  # [L, B, T, M], output of each layer
    final: jax.Array  # [B, T, M], after the last norm
    router_logits: jax.Array  # float32 [L, B, T, E]


@nnx.dataclass
class Block(nnx.Module):
    """Norm weights of every layer, `[L, M]`."""

    attn_norm: nnx.Param
    mlp_norm: nnx.Param


def _on_its_mesh(method: Method) -> Method:
    """A method of a model, computed on the mesh that its parameters lie on where none is set."""

    @functools.wraps(method)
    def run(self: "M1", *args: Any, **kwargs: Any) -> Any:
        with on_mesh_of(self.embed.get_value()):
            return method(self, *args, **kwargs)

    return cast(Method, run)


@nnx.dataclass
class M1(nnx.Module):
    """The model. `model(tokens)` and `model.step(tokens, state)` are pure; see `m1jax.params` for the shapes."""

    config: M1Config = nnx.static()
    embed: nnx.Param = nnx.data()
    block: Block = nnx.data()
    lightning: layers.Lightning = nnx.data()
    softmax: layers.Softmax = nnx.data()
    moe: layers.MoE = nnx.data()
    norm: nnx.Param = nnx.data()
    lm_head: nnx.Param | None = nnx.data(default=None)
    shared: layers.SharedExpert | None = nnx.data(default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.embed.dtype

    @_on_its_mesh
    def __call__(self, tokens: ArrayLike, segments: ArrayLike | None = None) -> jax.Array:
        """Logits float32 `[B, T, V]` of int32 tokens `[B, T]`, each row from position 0.

        Those of a `jax.Array` are not looked at, which would wait for the device; others must be of the vocabulary.

        `segments` int32 `[B, T]` are for rows packed with several sequences: the same id ≥ 1 for consecutive tokens of
        one sequence, 0 for padding. Each sequence then gives what it gives in a row of its own.
        """
        tokens = _tokens(tokens, self.config)
        return _forward(self, tokens, _segments(segments, tokens))

    @_on_its_mesh
    def init_state(self, batch: int, max_length: int) -> M1State:
        """The state before the first token, for `batch` rows of at most `max_length` tokens.

        Raises:
          UserError: `max_length` exceeds the model's context.
          ValueError: a number is not an integer of 1 or more.
        """
        cfg = self.config
        for name, count in (("batch", batch), ("max_length", max_length)):
            if not isinstance(count, int | np.integer) or count < 1:
                raise ValueError(f"{name}: expected an integer, 1 or more, got {count!r}")
        if max_length > cfg.max_position_embeddings:
            raise UserError(
                f"max_length {max_length} exceeds the context of {cfg.max_position_embeddings} tokens: shorten it"
            )
        return empty(cfg, self.dtype, batch, batch, max_length)

    @_on_its_mesh
    def step(
        self,
        tokens: ArrayLike,
        state: M1State,
        lengths: ArrayLike | None = None,
        logits: Logits = "all",
        recurrent: bool = False,
    ) -> tuple[jax.Array, M1State]:
        """Reads the next T ≥ 1 tokens of each row: a prefill, a chunk of one, or a decode step.

        Args:
          tokens: int32 `[B, T]`, padded on the right.
          state: what the tokens before left behind. Where `length + lengths` exceeds `max_length` keys and values are
            dropped, and the row's logits are NaN.
          lengths: integers `[B]` from 0 to T, how many of the T tokens of each row are valid; None is all. Those of a
            `jax.Array` are not looked at, which would wait for the device: out of range they spoil their rows.
          logits: "all" or "last", for which less of the last layer is computed.
          recurrent: lightning attention goes token by token, in T steps one after the other, and on a CPU softmax
            attention has all keys of a query at once. There, in bfloat16, and of so many rows that experts have 8 each
            on average, T tokens then come to the very numbers that T steps of one token come to, but for the float32
            head, and for one in a million where an exp in float32 is off by its last bit. Not so where the tokens of a
            sequence are split over devices.

        Returns:
          Logits float32 `[B, T, V]` (undefined at padded tokens), or with "last" `[B, V]` at each row's last valid
          token; and the new state.

        Raises:
          ValueError: an argument has the wrong shape or dtype, or tokens or lengths on the host are out of range; says
            which.
        """
        tokens = _next_tokens(tokens, state, self.config)
        if logits not in get_args(Logits):
            raise ValueError(f"logits: expected one of {get_args(Logits)}, got {logits!r}")
        return _step(self, tokens, state, _lengths(lengths, tokens), logits, recurrent=recurrent)[:2]

    @_on_its_mesh
    def routed_step(
        self, tokens: ArrayLike, state: M1State, lengths: ArrayLike | None = None, recurrent: bool = False
    ) -> tuple[jax.Array, M1State, jax.Array]:
        """`step` with the last logits, and the experts that every token went to: integers `[B, T, L, k]`."""
        tokens = _next_tokens(tokens, state, self.config)
        values, state, routes = _step(self, tokens, state, _lengths(lengths, tokens), "last", True, recurrent)
        assert routes is not None
        return values, state, routes

    @_on_its_mesh
    def trace(self, tokens: ArrayLike, segments: ArrayLike | None = None) -> Trace:
        """Inner values of `model(tokens, segments)`."""
        tokens = _tokens(tokens, self.config)
        return _trace(self, tokens, _segments(segments, tokens))

    @_on_its_mesh
    def first_bad_layer(self, tokens: ArrayLike, segments: ArrayLike | None = None) -> str | None:
        """Where NaN or infinity first appears in `model(tokens, segments)`; None if nowhere."""
        tokens = _tokens(tokens, self.config)
        bad = np.asarray(_bad(self, tokens, _segments(segments, tokens)))
        places = ["embedding", *(f"layer {i} ({kind})" for i, kind in enumerate(self.config.layer_types)), "lm_head"]
        return next((place for place, count in zip(places, bad, strict=True) if count), None)


def build(config: M1Config, leaf: Callable[[str, ParamSpec], Any], quantize: Quantization | None = None) -> M1:
    """A model whose parameters are `leaf(path, spec)` for each entry of `param_table(config, quantize)`."""
    leaves = join_quantized({path: leaf(path, spec) for path, spec in param_table(config, quantize).items()})
    axes = {path: spec.axes for path, spec in param_table(config).items()}
    tree = nest({path: nnx.Param(value, axes=axes[path]) for path, value in leaves.items()})
    return M1(
        config=config,
        embed=tree["embed"],
        block=Block(**tree["block"]),
        lightning=layers.Lightning(**tree["lightning"]),
        softmax=layers.Softmax(**tree["softmax"]),
        moe=layers.MoE(**tree["moe"]),
        norm=tree["norm"],
        lm_head=tree.get("lm_head"),
        shared=layers.SharedExpert(**tree["shared"]) if "shared" in tree else None,
    )


def abstract(config: M1Config, dtype: str = "bfloat16", quantize: Quantization | None = None) -> M1:
    """The model without its numbers: `jax.ShapeDtypeStruct` leaves."""
    return build(config, lambda _, spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype)), quantize)


def init_params(config: M1Config, key: jax.Array, dtype: str = "float32") -> M1:
    """A model with random parameters: normal with `initializer_range`, norms one."""
    keys = dict(zip(param_table(config), jax.random.split(key, len(param_table(config))), strict=True))

    def leaf(path: str, spec: ParamSpec) -> jax.Array:
        kind = jnp.dtype(spec.dtype or dtype)
        if spec.init is None:
            return jnp.ones(spec.shape, kind)
        return (jax.random.normal(keys[path], spec.shape, jnp.float32) * spec.init).astype(kind)

    return build(config, leaf)


# --- forward -------------------------------------------------------------------------------------------------------


def head(model: M1, x: jax.Array) -> jax.Array:
    """Logits float32 `[..., V]` of normed hidden states `[..., M]`; the weights are up-cast, products exact float32."""
    return _logits(x, _head_weight(model))


def _head_weight(model: M1) -> jax.Array:
    w = model.embed if model.lm_head is None else model.lm_head
    return whole(w[...], w.axes)


def _logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return linear(flat, weight[None], 0).reshape(*x.shape[:-1], -1)


def _tokens(tokens: ArrayLike, config: M1Config) -> jax.Array:
    if not isinstance(tokens, jax.Array):  # on the host, where a look is free
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integers [B, T], each 1 or more, got {tokens.dtype} {tokens.shape}")
    if isinstance(tokens, np.ndarray) and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(f"tokens: expected 0 to {config.vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
    return jnp.asarray(tokens, jnp.int32)


def _next_tokens(tokens: ArrayLike, state: M1State, config: M1Config) -> jax.Array:
    tokens = _tokens(tokens, config)
    if state.length.shape[0] != tokens.shape[0]:
        raise ValueError(f"state: made for {state.length.shape[0]} rows, tokens have {tokens.shape[0]}")
    return tokens


def _segments(segments: ArrayLike | None, tokens: jax.Array) -> jax.Array | None:
    if segments is None:
        return None
    if not isinstance(segments, jax.Array):  # on the host, where a look is free
        segments = np.asarray(segments)
    if segments.shape != tokens.shape or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(f"segments: expected integers {tokens.shape}, got {segments.dtype} {segments.shape}")
    if isinstance(segments, np.ndarray) and segments.min() < 0:
        raise ValueError(f"segments: expected ids of 1 or more, 0 for padding, got {segments.min()}")
    return jnp.asarray(segments, jnp.int32)


def _lengths(lengths: ArrayLike | None, tokens: jax.Array) -> jax.Array:
    B, T = tokens.shape
    if lengths is None:
        return jnp.full((B,), T, jnp.int32)
    if not isinstance(lengths, jax.Array):  # on the host, where a look is free
        lengths = np.asarray(lengths)
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths: expected integers {(B,)}, got {lengths.dtype} {lengths.shape}")
    if isinstance(lengths, np.ndarray) and np.any((lengths < 0) | (lengths > T)):
        raise ValueError(f"lengths: expected 0 to {T}, got {lengths.tolist()}")
    return jnp.asarray(lengths, jnp.int32)


def embed(model: M1, tokens: jax.Array) -> jax.Array:
    """Embeddings `[B, T, M]` of tokens `[B, T]`."""
    return lookup(whole(model.embed[...], model.embed.axes), tokens)


def final_norm(model: M1, x: jax.Array) -> jax.Array:
    """The norm before the head."""
    return layers.rms_norm(x, model.norm[...], model.config.rms_norm_eps)


def last_valid(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Of x `[B, T, M]` each row's last valid token, `[B, M]`, or its first where none is valid."""
    at = jnp.maximum(lengths - 1, 0) - start("sequence", x.shape[1])
    here = (at >= 0) & (at < x.shape[1])
    picked = token_at(x, jnp.where(here, at, 0))[:, 0]
    return total(jnp.where(here[:, None], picked, 0), "sequence")


TOKENS = ("batch", "sequence")


def stretched(x: jax.Array | None) -> jax.Array | None:
    """x `[B, T, ...]` with zeros at the end, so that every device has as many tokens."""
    if x is None:
        return None
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % ways("sequence")), *((0, 0),) * (x.ndim - 2)))


def _stateless(model: M1, tokens: jax.Array, lengths: jax.Array, carry: Carry, segments: jax.Array | None) -> Carry:
    return body(model, carry, jnp.zeros(tokens.shape[:1], jnp.int32), lengths, segments=segments)


@jax.jit
def _forward(model: M1, tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    def local(model: M1, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None) -> jax.Array:
        carry = Carry(embed(model, tokens), None, None, None, None, None)
        carry = _stateless(model, tokens, lengths, carry, segments)
        return head(model, final_norm(model, carry.x))

    B, T = tokens.shape
    run = on_mesh(local, model.config, (*TOKENS, "vocab"), model=(), tokens=TOKENS, lengths=("batch",), segments=TOKENS)
    return run(model, stretched(tokens), jnp.full((B,), T, jnp.int32), stretched(segments))[:, :T]


@jax.jit
def _trace(model: M1, tokens: jax.Array, segments: jax.Array | None) -> Trace:
    cfg = model.config

    def local(model: M1, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None) -> Trace:
        x = embed(model, tokens)
        hidden = jnp.zeros((cfg.num_hidden_layers, *x.shape), x.dtype)
        logits = jnp.zeros((cfg.num_hidden_layers, *tokens.shape, cfg.num_local_experts), jnp.float32)
        carry = _stateless(model, tokens, lengths, Carry(x, None, None, None, hidden, logits), segments)
        assert carry.hidden is not None and carry.router_logits is not None
        return Trace(x, carry.hidden, final_norm(model, carry.x), carry.router_logits)

    B, T = tokens.shape
    wide = (*TOKENS, "channel")
    out = (wide, ("layer", *wide), wide, ("layer", *TOKENS, "router"))
    run = on_mesh(local, cfg, Trace._make(out), model=(), tokens=TOKENS, lengths=("batch",), segments=TOKENS)
    trace: Trace = run(model, stretched(tokens), jnp.full((B,), T, jnp.int32), stretched(segments))
    return Trace(trace.embedding[:, :T], trace.hidden[:, :, :T], trace.final[:, :T], trace.router_logits[:, :, :T])


@jax.jit
def _bad(model: M1, tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Above 0 where something is not finite: int32 `[L + 2]` for the embedding, each layer's output, the logits.

    Nothing of a layer is kept, and of the logits there are only those of a few tokens at a time: a batch that was
    trained on leaves no room for more.
    """
    cfg = model.config

    def local(model: M1, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None) -> jax.Array:
        x = embed(model, tokens)
        B, T, M = x.shape
        own = start("sequence", T) + jnp.arange(T) < lengths[:, None]
        layers = jnp.zeros((cfg.num_hidden_layers,), jnp.int32)
        carry = _stateless(model, tokens, lengths, Carry(x, None, None, None, None, None, layers), segments)
        assert carry.bad is not None
        weight = _head_weight(model)
        C = min(max(1, MOST_LOGITS // weight.shape[0]), B * T)
        more = -(B * T) % C
        last = jnp.pad(final_norm(model, carry.x).reshape(-1, M), ((0, more), (0, 0))).reshape(-1, C, M)
        of_last = jnp.pad(own.reshape(-1), (0, more)).reshape(-1, C)
        logits = lax.map(lambda some: not_finite(_logits(some[0], weight), some[1]), (last, of_last))
        bad = jnp.concatenate([not_finite(x, own)[None], carry.bad, total(jnp.max(logits), "vocab")[None]])
        return total(total(bad, "batch"), "sequence")

    B, T = tokens.shape
    run = on_mesh(local, cfg, ("layer",), model=(), tokens=TOKENS, lengths=("batch",), segments=TOKENS)
    return run(model, stretched(tokens), jnp.full((B,), T, jnp.int32), stretched(segments))


def read(
    model: M1,
    tokens: jax.Array,
    state: M1State,
    lengths: jax.Array,
    last_only: bool = False,
    routed: bool = False,
    recurrent: bool = False,
) -> tuple[jax.Array, M1State, jax.Array | None]:
    """The last layer's output `[B, T, M]` for tokens `[B, T]`, the state after them, and if `routed` their experts.

    `last_only` as in `body`, `recurrent` as in `M1.step`; the experts are `[B, T, L, k]`.
    """
    cfg = model.config
    kind = jnp.uint8 if cfg.num_local_experts <= 256 else jnp.uint16
    none = jnp.zeros((cfg.num_hidden_layers, *tokens.shape, cfg.num_experts_per_tok), kind) if routed else None
    cache = state.cache
    carry = Carry(embed(model, tokens), state.lightning.s, cache.k, cache.v, None, None, routes=none)
    carry = body(model, carry, state.length, lengths, last_only=last_only, recurrent=recurrent, pages=state.pages)
    assert carry.s is not None and carry.k is not None and carry.v is not None
    routes = None if carry.routes is None else jnp.moveaxis(carry.routes, 0, 2)
    return carry.x, M1State(LightningState(carry.s), KVCache(carry.k, carry.v), state.length + lengths), routes


@functools.partial(jax.jit, static_argnames=("logits", "routed", "recurrent"))
def _step(
    model: M1,
    tokens: jax.Array,
    state: M1State,
    lengths: jax.Array,
    logits: Logits,
    routed: bool = False,
    recurrent: bool = False,
) -> tuple[jax.Array, M1State, jax.Array | None]:
    """Logits, the new state, and the experts that the tokens went to if `routed`."""
    last, room = logits == "last", state.max_length

    def local(
        model: M1, tokens: jax.Array, state: M1State, lengths: jax.Array
    ) -> tuple[jax.Array, M1State, jax.Array | None]:
        # Of the last layer's tokens all choose experts.
        x, state, routes = read(model, tokens, state, lengths, last and not routed, routed, recurrent)
        values = head(model, final_norm(model, last_valid(x, lengths) if last else x))
        over = (state.length > room).reshape(-1, *(1,) * (values.ndim - 1))
        values = jnp.where(over, jnp.nan, values)
        return values, dataclasses.replace(state, length=after(state.length, values)), routes

    out = (("batch", "vocab") if last else (*TOKENS, "vocab"), STATE, (*TOKENS, "layer", "router") if routed else None)
    run = on_mesh(local, model.config, out, model=(), tokens=TOKENS, state=(), lengths=("batch",))
    values, new, routes = run(model, stretched(tokens), state, lengths)
    state = dataclasses.replace(new, pages=state.pages)
    T = tokens.shape[1]
    return values if last else values[:, :T], state, None if routes is None else routes[:, :T]
