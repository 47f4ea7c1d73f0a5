"""Cross-entropy without the logits of all tokens at once, and the balancing loss of the routers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.config import M1Config
from m1jax.model import M1, TOKENS
from m1jax.sharding.region import greatest, on_mesh, start, total, ways, whole
from m1jax.train.forward import Routing
from m1jax.train.settings import OptimizerSettings, Over

CHUNK = 1 << 24  # logits that exist at a time


def token_log_probs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and the entropy of its distribution, a few tokens at a time.

    The head is float32 whatever the dtype of the hidden states, as in inference. The gradient makes the logits again,
    so that `[B, T, V]` never exists.

    Args:
      hidden: `[B, T, M]` after the last norm.
      head: float32 `[V, M]`.
      targets: int32 `[B, T]`.
      temperature: divides the logits.

    Returns:
      float32 `[B, T]` each, in nats; no gradient reaches the entropy.
    """
    run = on_mesh(
        functools.partial(_token_log_probs, temperature=temperature),
        None,
        (TOKENS, TOKENS),
        hidden=(*TOKENS, "channel"),
        head=("vocab", "hidden"),
        targets=TOKENS,
    )
    T = targets.shape[1]
    longer = ((0, 0), (0, -T % ways("sequence")), (0, 0))
    log_p, entropy = run(jnp.pad(hidden, longer), head, jnp.pad(targets, longer[:2]))
    return log_p[:, :T], entropy[:, :T]


def _token_log_probs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The same of a device's own tokens, with its part of the vocabulary."""
    head = whole(head, ("vocab", "hidden"))
    B, T, M = hidden.shape
    N = B * T
    C = min(max(CHUNK // head.shape[0] // 8 * 8, 8), N)
    n = -(-N // C)
    flat = jnp.pad(hidden.reshape(N, M), ((0, n * C - N), (0, 0)))
    wanted = jnp.pad(targets.reshape(N), (0, n * C - N))

    @jax.checkpoint
    def some(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, wanted = inputs
        logits = jnp.einsum("nm,vm->nv", h.astype(jnp.float32), head, precision="highest") / temperature
        largest = greatest(lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), "vocab")
        below = logits - largest  # as in `jax.nn.log_softmax`, or what is near 0 would be rounded as the logits are
        log_p = below - jnp.log(total(jnp.sum(jnp.exp(below), axis=-1, keepdims=True), "vocab"))
        still = lax.stop_gradient(log_p)
        at = wanted[:, None] - start("vocab", head.shape[0])
        here = (at >= 0) & (at < head.shape[0])
        own = jnp.where(here, jnp.take_along_axis(log_p, jnp.where(here, at, 0), axis=1), 0.0)[:, 0]
        return total(own, "vocab"), -total(jnp.sum(jnp.exp(still) * still, axis=-1), "vocab")

    log_p, entropy = lax.map(some, (flat.reshape(n, C, M), wanted.reshape(n, C)))
    return log_p.reshape(-1)[:N].reshape(B, T), entropy.reshape(-1)[:N].reshape(B, T)


def head_weight(model: M1) -> jax.Array:
    """The head's matrix `[V, M]`."""
    return (model.embed if model.lm_head is None else model.lm_head)[...]


def balancing_loss(routing: Routing, over: Over = "model") -> jax.Array:
    """E · Σ_e f_e · p̄_e: how often a token chooses expert e, times its mean probability.

    k where all experts are used alike; f counts and has no gradient. 0 of padding alone.

    Args:
      routing: of all layers.
      over: f and p̄ are means over the valid tokens of all layers ("model", official `load_balancing_loss_func`), or of
        each layer, whose losses are averaged ("layer", GShard, arXiv 2006.16668).
    """
    E, chosen = routing.probability.shape[1], jnp.sum(routing.chosen, axis=1)
    parts = chosen, routing.probability, routing.tokens[:, None]  # [L, E], [L, E], [L, 1]
    if over == "model":
        parts = tuple(jnp.sum(part, axis=0, keepdims=True) for part in parts)
    chosen, probability, tokens = parts
    total = jnp.maximum(tokens, 1.0)
    return E * jnp.mean(jnp.sum(chosen / total * (probability / total), axis=-1))


class Balance(NamedTuple):
    """The balancing loss as it is trained with."""

    weight: float
    over: Over = "model"

    def __call__(self, routing: Routing) -> jax.Array:
        """Not weighted."""
        return balancing_loss(routing, self.over)

    @classmethod
    def of(cls, settings: OptimizerSettings, config: M1Config) -> "Balance":
        """As the settings say, or the model's config."""
        return cls(settings.balance if settings.balance >= 0 else config.router_aux_loss_coef, settings.balance_over)
