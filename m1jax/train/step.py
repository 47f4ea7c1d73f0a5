"""One step: gradients of several batches added up, clipped, AdamW on float32 weights, and a guard in front of it."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.kernels.segments import positions
from m1jax.lora.factors import Base, Lora
from m1jax.model import M1, build
from m1jax.params import flatten, param_table
from m1jax.train.forward import Remat, hidden_states
from m1jax.train.loss import Balance, head_weight, token_log_probs
from m1jax.train.settings import GuardSettings, OptimizerSettings

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Trained = Any  # a float32 model, or factors beside one
# (float32 model, batch [B, T], total of each weight) -> loss, and metrics that add up over batches
Loss = Callable[[M1, Batch, Metrics], tuple[jax.Array, Metrics]]

CALM = 50  # steps before a spike is called one
MEMORY = 0.98  # of the running mean and variance of the loss
DEVIATION = 0.01, 0.02  # that a loss has at the least: as a part of the mean, and itself
NOTED = 5  # deviations that a spike counts for in the mean and variance: ten in a row make the limit six times as wide
KEPT = functools.lru_cache(maxsize=8)  # runs of one process that are set alike share what is compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes, float32: what a checkpoint holds."""

    model: Trained
    optimizer: Any
    step: jax.Array  # int32 [], steps tried
    accepted: jax.Array  # int32 [], steps taken
    mean: jax.Array  # float32 [], running mean of the loss
    variance: jax.Array  # float32 []


def init_state(model: Trained, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a float32 model, or of factors."""
    # Buffers of their own: the step gives each of them away.
    counts, figures = ([jnp.zeros((), kind) for _ in range(2)] for kind in (jnp.int32, jnp.float32))
    return TrainState(model, optimizer.init(model), *counts, *figures)  # pyright: ignore[reportArgumentType]


def schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step: linear up, constant, linear down to a fraction (MiniCPM, arXiv 2404.06395).

    Raises:
      UserError: the steps are too few for the way down.
    """
    if settings.decay and settings.warmup + settings.decay > steps:
        raise UserError(
            f"optimizer.warmup = {settings.warmup} and decay = {settings.decay} do not fit into {steps} steps"
        )
    peak, stay = settings.learning_rate, max(steps - settings.warmup - settings.decay, 0)
    parts, ends = [optax.constant_schedule(peak)], []
    if settings.warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, settings.warmup), *parts], [settings.warmup]
    if settings.decay:
        parts.append(optax.linear_schedule(peak, peak * settings.final, settings.decay))
        ends.append(settings.warmup + stay)
    joined = optax.join_schedules(parts, ends)
    return lambda count: joined(count + 1)  # the first step counts, and the last one has arrived


def rate_factors(parameters: Iterable[str], text: str) -> dict[str, float]:
    """Factor of the learning rate by parameter, from a setting such as "softmax.*=5,moe.router=0".

    Raises:
      UserError: it is written otherwise, a factor is negative, all are 0, or a pattern fits no parameter.
    """
    factors = dict.fromkeys(parameters, 1.0)
    for part in filter(None, text.split(",")):
        pattern, _, number = (word.strip() for word in part.partition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 0 <= factor < math.inf:
            raise UserError(f"optimizer.rates: {part.strip()!r} must be NAME=FACTOR, a factor of 0 or more")
        names = fnmatch.filter(factors, pattern)
        if not names:
            raise UserError(f"optimizer.rates: no parameter is named {pattern!r}: there are {', '.join(factors)}")
        factors |= dict.fromkeys(names, factor)
    if not any(factors.values()):
        raise UserError(f"optimizer.rates = {text!r} leaves nothing to train: give a parameter a factor above 0")
    return factors


def adamw(
    config: M1Config, settings: OptimizerSettings, steps: int, lora: Lora | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW without decay of norms, schedule, each parameter's own rate. Raises `UserError`.

    An update is at step `at` of the schedule; without one, at that after the update before. With `lora` the parameters
    are its factors.
    """
    steps = steps if settings.decay else 0  # without a way down their number is of no matter
    return _adamw(config, settings, steps, lora)


@KEPT
def _adamw(
    config: M1Config, settings: OptimizerSettings, steps: int, lora: Lora | None
) -> optax.GradientTransformationExtraArgs:
    table, tree = (param_table, build) if lora is None else (lora.table, lora.build)
    decayed = tree(config, lambda _, spec: spec.init is not None)
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    rate, factor = optax.scale_by_learning_rate(schedule(settings, steps)), rate_factors(table(config), settings.rates)
    factors = tree(config, lambda path, _: factor[path])

    def scaled(updates: Any, state: Any, params: Any = None, *, at: Any = None, **_: Any) -> tuple[Any, Any]:
        state = state if at is None else state._replace(count=jnp.asarray(at, state.count.dtype))
        updates, state = rate.update(updates, state, params)
        return jax.tree.map(jnp.multiply, updates, factors), state

    return optax.chain(
        clip,
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps or 1e-8),
        optax.add_decayed_weights(settings.weight_decay, decayed),
        optax.GradientTransformationExtraArgs(rate.init, scaled),  # no state of its own: a run goes on with other rates
    )


def computing(model: M1, dtype: str) -> M1:
    """The float32 model as it computes: in `dtype`, but for what is always float32, integers, and the head."""
    kept = {"lm_head", *(path for path, spec in param_table(model.config, "int8").items() if spec.dtype is not None)}
    leaves = [leaf if path in kept else leaf.astype(dtype) for path, leaf in flatten(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


@KEPT
def cross_entropy(dtype: str, remat: Remat, balance: Balance, capacity: float | None = None) -> Loss:
    """The loss of pretraining and SFT: mean over weighted tokens, and the balancing loss.

    A batch has int32 `tokens`, `targets`, `segments` and float32 `weights`, all `[B, T]`. Added up over batches that
    make one step, the cross-entropy is that of all their tokens; the balancing loss is each batch's own, weighted by
    its share of the tokens. With a `capacity`, experts drop what goes beyond it; the metric `dropped` is the share.
    """

    def loss(model: M1, batch: Batch, total: Metrics) -> tuple[jax.Array, Metrics]:
        hidden, routing = hidden_states(computing(model, dtype), batch["tokens"], batch["segments"], remat, capacity)
        log_p, entropy = token_log_probs(hidden, head_weight(model), batch["targets"])
        weights = batch["weights"]
        nll = -jnp.sum(log_p * weights) / total["weights"]
        share = jnp.sum(batch["segments"] > 0) / total["tokens"]
        balancing = balance(routing) * share
        choices = routing.chosen.shape[0] * routing.chosen.shape[1]  # of a token, in all layers
        metrics = {
            "cross_entropy": nll,
            "balance": balancing,
            "entropy": jnp.sum(entropy * weights) / total["weights"],
            "load": jnp.sum(routing.chosen, axis=1),  # [L, E]
            "router_entropy": routing.entropy / total["tokens"],  # [L]
            "dropped": jnp.sum(routing.dropped) / (total["tokens"] * choices),
        }
        return nll + balance.weight * balancing, metrics

    return loss


def totals(batch: Batch) -> Metrics:
    """What the batches of one step are weighted by."""
    weights, tokens = jnp.sum(batch["weights"]), jnp.sum(batch["segments"] > 0)
    return {"weights": jnp.maximum(weights, 1e-9), "tokens": jnp.maximum(tokens, 1).astype(jnp.float32)}


@KEPT
def measuring(loss: Loss) -> Callable[[M1, Batch], Metrics]:
    """The compiled metrics of the first of the batches `[A, B, T]`, and what it weighs among others, no gradient."""

    def measure(model: M1, batch: Batch) -> Metrics:
        some = jax.tree.map(lambda a: a[0], batch)
        total = totals(some)
        return loss(model, some, total)[1] | {"weights": total["weights"]}

    return jax.jit(measure)


def beside(loss: Loss, base: Base | None) -> Any:
    """The loss of a model as a function of factors beside it; without `base` the loss itself."""
    if base is None:
        return loss
    return lambda factors, batch, total: loss(base.with_factors(factors), batch, total)


def _of_trained(loss: Any, setting: str) -> Any:
    """The loss as a function of the parameters alone whose rate is not 0: others cost no gradient, nor are clipped."""

    def of_trained(model: Trained, batch: Batch, total: Metrics) -> tuple[jax.Array, Metrics]:
        arrays = flatten(model)
        factor = rate_factors(arrays, setting)
        held = [x if factor[path] else lax.stop_gradient(x) for path, x in arrays.items()]
        return loss(jax.tree.unflatten(jax.tree.structure(model), held), batch, total)

    return of_trained if setting else loss


@KEPT
def make_step(
    loss: Loss, optimizer: optax.GradientTransformationExtraArgs, guard: GuardSettings, rates: str = ""
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled step; the old state's memory is given to the new one.

    It takes a batch with a leading axis of batches to accumulate, `[A, B, T]`, and `at` as `adamw` does. A step whose
    loss or gradient is not finite, or whose loss is a spike, above metric `loss_limit`, changes no weight: metric
    `good` is then false. `rates` as in `OptimizerSettings`. Metrics are those of the loss and what else a report wants;
    those of `_size` are sums. Where factors are trained, `base` is what they are beside.
    """

    def step(
        state: TrainState, batch: Batch, at: int | None = None, base: Base | None = None
    ) -> tuple[TrainState, Metrics]:
        gradient, metrics = accumulated(_of_trained(beside(loss, base), rates), state.model, batch)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        deviation = jnp.maximum(jnp.sqrt(state.variance), _least(state.mean))
        limit = state.mean + guard.spike * deviation
        calm = (state.accepted < CALM) | (metrics["loss"] <= limit) | (guard.spike == 0)
        metrics["good"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"]) & calm
        metrics["loss_limit"] = limit
        metrics |= _size(batch["segments"])

        update, moved = optimizer.update(gradient, state.optimizer, state.model, at=at)  # pyright: ignore[reportArgumentType]
        mean, variance = _noted(state, metrics["loss"])
        model = jax.tree.map(jnp.add, state.model, update)
        new = TrainState(model, moved, state.step + 1, state.accepted + 1, mean, variance)
        old = dataclasses.replace(state, step=state.step + 1)
        if guard.action == "skip":  # a level that the loss keeps to is no spike after a while
            noted = _noted(state, jnp.minimum(metrics["loss"], state.mean + NOTED * deviation))
            known = jnp.isfinite(metrics["loss"])
            mean, variance = (jnp.where(known, a, b) for a, b in zip(noted, (state.mean, state.variance), strict=True))
            old = dataclasses.replace(old, mean=mean, variance=variance)
        return jax.tree.map(lambda a, b: jnp.where(metrics["good"], a, b), new, old), metrics

    return jax.jit(step, donate_argnums=0)


def _size(segments: jax.Array) -> Metrics:
    """How many tokens there are in `[A, B, T]`, and how many their queries see in their segments, all together."""
    seen = jax.vmap(positions)(segments) + 1  # A and B as one axis would be gathered from all devices
    valid = segments > 0
    return {"tokens": jnp.sum(valid), "seen": jnp.sum(jnp.where(valid, seen, 0).astype(jnp.float32))}


def _least(mean: jax.Array) -> jax.Array:
    """The least deviation of a loss of this mean."""
    part, itself = DEVIATION
    return jnp.maximum(part * jnp.abs(mean), itself)


def _noted(state: TrainState, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance with one more loss."""
    keep = jnp.where(state.accepted == 0, 0.0, MEMORY)
    away = loss - state.mean
    mean = state.mean + (1 - keep) * away
    variance = jnp.where(state.accepted == 0, 0.0, keep * (state.variance + (1 - keep) * away * away))
    return mean, variance


def accumulated(loss: Any, model: Trained, batch: Batch) -> tuple[Trained, Metrics]:
    """Gradient and metrics, `loss` of `model` among them, of batches `[A, B, T]` as of one."""
    total = totals(batch)

    @functools.partial(jax.jit, inline=True)  # traced once, though asked for its shapes first
    def one(model: Trained, total: Metrics, some: Batch) -> tuple[Trained, Metrics]:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model, some, total)
        return gradient, {"loss": value, **metrics}

    first = jax.tree.map(lambda a: a[0], batch)
    if next(iter(batch.values())).shape[0] == 1:
        return one(model, total, first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, model, total, first))
    return lax.scan(lambda sums, some: (jax.tree.map(jnp.add, sums, one(model, total, some)), None), zeros, batch)[0]
