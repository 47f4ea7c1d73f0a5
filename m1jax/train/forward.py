"""The forward pass in the form that gradients want: every layer's weights come to the loop as its input.

So the gradient of a stack of weights is written layer by layer, where indexing in the loop, which inference does, would
add up one zero-padded stack per layer. Weights that are not trained, with factors beside them, are read where they lie,
as in inference: what comes to a loop as its input is copied for the gradient. Letters as in `m1jax.model`.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from m1jax.config import LIGHTNING, M1Config
from m1jax.lora.adapted import has_factors
from m1jax.model import M1, TOKENS, embed, final_norm, stretched
from m1jax.sharding.capacity import within_capacity
from m1jax.sharding.region import block, on_mesh, start, total
from m1jax.stack import Carry, Run, all_decays, body, period, runs

Remat = Literal["none", "projections", "layer"]


class Routing(NamedTuple):
    """What the routers did, summed over the valid tokens; float32, one row for each layer."""

    chosen: jax.Array  # [L, k, E], how often expert e was a token's choice number j
    probability: jax.Array  # [L, E]
    entropy: jax.Array  # [L], in nats
    tokens: jax.Array  # [L]
    dropped: jax.Array  # [L], choices beyond the experts' capacity; 0 without one


def hidden_states(
    model: M1,
    tokens: ArrayLike,
    segments: ArrayLike | None = None,
    remat: Remat = "layer",
    capacity: float | None = None,
    routes: ArrayLike | None = None,
    recurrent: bool = False,
) -> tuple[jax.Array, Routing]:
    """Hidden states `[B, T, M]` after the last norm, ready for the head, and what the routers did.

    Args:
      model: parameters in the dtype to compute in.
      tokens: int32 `[B, T]`, each row from position 0.
      segments: int32 `[B, T]` for packed rows, as in `M1.__call__`; None: every token is valid.
      remat: what the gradient keeps of each layer: "none" everything (nothing is computed twice), "projections" the
        outputs of the matrices of attention, "layer" only the layer's input.
      capacity: of the experts, as in `m1jax.sharding.capacity`; None drops no token.
      routes: integers `[B, T, L, k]`, the experts to take in place of the routers' choice.
      recurrent: lightning attention goes token by token, as in `M1.step`; not so its gradient.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    routes = None if routes is None else jnp.asarray(routes)

    def local(
        model: M1, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None, routes: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        by_layer = None if routes is None else jnp.moveaxis(routes, 2, 0)
        x, routing = _layers(model, embed(model, tokens), lengths, segments, remat, capacity, by_layer, recurrent)
        routing = jax.tree.map(lambda a: total(total(a, "batch"), "sequence"), routing)
        return final_norm(model, x), routing

    B, T = tokens.shape
    out = ((*TOKENS, "channel"), Routing((), (), (), (), ()))  # pyright: ignore[reportArgumentType]
    named = {"tokens": TOKENS, "lengths": ("batch",), "segments": TOKENS, "routes": (*TOKENS, "layer", "router")}
    run = on_mesh(local, model.config, out, model=(), **named)
    x, routing = run(model, stretched(tokens), jnp.full((B,), T, jnp.int32), stretched(segments), stretched(routes))
    return x[:, :T], routing


def _layers(
    model: M1,
    x: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None,
    remat: Remat,
    capacity: float | None,
    routes: jax.Array | None,
    recurrent: bool,
) -> tuple[jax.Array, Routing]:
    cfg = model.config
    p = period(cfg.layer_types)
    one_period = runs(cfg.layer_types[:p])
    held = has_factors(model)

    def of_run(run: Run) -> tuple[Any, Any]:
        """What the layers of a run read, [L/p, layers of it in a period, ...]: decays and routes, and weights."""
        mixer = model.lightning if run.kind == LIGHTNING else model.softmax
        of_all: Any = (model.block, model.moe, model.shared)
        if held:  # their places
            of_all, mixer = jnp.arange(cfg.num_hidden_layers), jnp.arange(cfg.layer_types.count(run.kind))
        given = _cut((block(all_decays(cfg), 1, "heads"), routes), cfg, p, run.layer, run.layers)
        weights = _cut(of_all, cfg, p, run.layer, run.layers), _cut(mixer, cfg, p, run.among_kind, run.layers)
        return given, weights

    step = functools.partial(_layer, model, lengths, segments, capacity, recurrent, held)

    def one(x: jax.Array, of_runs: Any) -> tuple[jax.Array, Routing]:
        parts = []
        for run, inputs in zip(one_period, of_runs, strict=True):
            x, routing = _run(step, run, x, inputs, remat)
            parts.append(routing)
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    x, routing = lax.scan(one, x, [of_run(run) for run in one_period])
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), routing)


def _run(step: Any, run: Run, x: jax.Array, inputs: Any, remat: Remat) -> tuple[jax.Array, Routing]:
    """Consecutive layers of one kind."""
    layer = _checkpointed(functools.partial(step, run.kind), remat)
    return lax.scan(layer, x, inputs)


def _checkpointed(layer: Any, remat: Remat) -> Any:
    if remat == "none":
        return layer
    if remat == "layer":
        return jax.checkpoint(layer, prevent_cse=False)  # in a scan nothing could be merged
    if remat == "projections":
        return jax.checkpoint(
            layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names("projection")
        )
    raise ValueError(f"remat: unknown {remat!r}: expected 'none', 'projections' or 'layer'")


def _layer(
    model: M1,
    lengths: jax.Array,
    segments: jax.Array | None,
    capacity: float | None,
    recurrent: bool,
    held: bool,
    kind: str,
    x: jax.Array,
    inputs: Any,
) -> tuple[jax.Array, Routing]:
    """One layer: the body of a model that has no other, or reads no other's weights."""
    (decay, routes), weights = inputs
    decay, routes = jax.tree.map(lambda a: a[None], (decay, routes))
    cfg = dataclasses.replace(model.config, num_hidden_layers=1, layer_types=(kind,))
    at: Any = (0, 0)
    if held:
        one, at = dataclasses.replace(model, config=cfg), weights
    else:
        (norms, moe, shared), mixer = jax.tree.map(lambda a: a[None], weights)
        parts = {"block": norms, "moe": moe, "shared": shared, "lightning" if kind == LIGHTNING else "softmax": mixer}
        one = dataclasses.replace(model, config=cfg, lm_head=None, **parts)
    B, T = x.shape[:2]
    logits = jnp.zeros((1, B, T, cfg.num_local_experts), jnp.float32)
    carry = Carry(x, None, None, None, None, logits)
    seen = jnp.zeros((B,), jnp.int32)
    carry = body(
        one, carry, seen, lengths, decay, segments, capacity, routes=routes, recurrent=recurrent, parameters=at
    )
    assert carry.router_logits is not None
    valid = start("sequence", T) + jnp.arange(T) < lengths[:, None]
    if segments is not None:
        valid &= segments > 0
    return carry.x, _routing(carry.router_logits[0], valid, cfg, capacity)


def _routing(logits: jax.Array, valid: jax.Array, config: M1Config, capacity: float | None) -> Routing:
    """Sums over the valid tokens of router logits `[B, T, E]`."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    _, chosen = lax.top_k(p, config.num_experts_per_tok)
    weight = valid.astype(jnp.float32)
    dropped = jnp.zeros(())
    if capacity is not None:
        wanted = jnp.where(valid[..., None], chosen, config.num_local_experts)
        kept = within_capacity(wanted, config.num_local_experts, capacity)
        dropped = jnp.sum(kept != wanted).astype(jnp.float32)
    choices = jax.nn.one_hot(chosen, config.num_local_experts, dtype=jnp.float32)
    return Routing(
        jnp.einsum("btke,bt->ke", choices, weight),
        jnp.einsum("bte,bt->e", p, weight, precision="highest"),
        -jnp.einsum("bte,bte,bt->", p, log_p, weight, precision="highest"),
        jnp.sum(weight),
        dropped,
    )


def _cut(tree: Any, config: M1Config, p: int, first: int, count: int) -> Any:
    """Of stacks `[n, ...]` some layers of every period: `[L/p, count, ...]`."""
    periods = config.num_hidden_layers // p
    return jax.tree.map(lambda a: a.reshape(periods, -1, *a.shape[1:])[:, first : first + count], tree)
