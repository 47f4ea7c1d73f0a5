"""The loss of a policy update for `m1jax.train.step`, and how well its log-probabilities agree with the rollout's.

Letters: B rows, T tokens of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.model import M1
from m1jax.rl.losses import PolicyLoss, ratio, weighted_mean
from m1jax.train.forward import Remat, hidden_states
from m1jax.train.loss import Balance, head_weight, token_log_probs
from m1jax.train.step import KEPT, Batch, Loss, Metrics, computing


@KEPT
def policy_gradient(
    policy_loss: PolicyLoss, temperature: float, dtype: str, remat: Remat, balance: Balance, recurrent: bool = False
) -> Loss:
    """The loss of a batch with the arrays of `m1jax.rl.experience.Experience`, its mean by their weights.

    `recurrent` as in `hidden_states`.
    """

    def loss(model: M1, batch: Batch, total: Metrics) -> tuple[jax.Array, Metrics]:
        # The policy is the model as it computes, which wrote the replies: where embeddings are tied, so is its head.
        policy = computing(model, dtype)
        hidden, routing = hidden_states(
            policy, batch["tokens"], batch["segments"], remat, routes=batch.get("routes"), recurrent=recurrent
        )
        logp, entropy = token_log_probs(hidden, head_weight(policy), batch["targets"], temperature)
        generated = batch["weights"] > 0

        def mean(values: jax.Array) -> jax.Array:
            return weighted_mean(values, batch["weights"], total["weights"])

        old = batch["old_logp"]
        objective = mean(policy_loss.per_token(logp, old, batch["advantage"]))
        balancing = balance(routing) * jnp.sum(batch["segments"] > 0) / total["tokens"]
        r = jnp.where(generated, ratio(logp, old), 1.0)
        metrics = {
            "policy": objective,
            "balance": balancing,
            "entropy": mean(entropy),
            "ratio": mean(r),
            "outside": mean((r < policy_loss.floor) | (r > policy_loss.cap)),
            "load": jnp.sum(routing.chosen, axis=1),
            "router_entropy": routing.entropy / total["tokens"],
            "agreement": agreement(logp, old, generated),
        }
        return objective + balance.weight * balancing, metrics

    return loss


def agreement(ours: jax.Array, theirs: jax.Array, mask: jax.Array) -> jax.Array:
    """What `correlation` takes, of log-probabilities and of probabilities, over the mask: float32 `[2, 6]`, additive.

    Of probabilities by way of 1 - p, which is exact where a policy is sure of itself and all p are nearly 1.
    """
    return jnp.stack([_moments(ours, theirs, mask), _moments(-jnp.expm1(ours), -jnp.expm1(theirs), mask)])


def _moments(ours: jax.Array, theirs: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums of 1, b, b², d, d², d b over the mask, b `theirs` and d the difference: float32 `[6]`, additive."""
    b, d = jnp.where(mask, theirs, 0.0), jnp.where(mask, ours - theirs, 0.0)
    return jnp.stack([jnp.sum(x) for x in (mask.astype(jnp.float32), b, b * b, d, d * d, d * b)])


def correlation(moments: np.ndarray) -> float:
    """Pearson's correlation of a and b from the sums of `_moments`; NaN where one of them does not vary.

    By way of the difference: sums of a b itself, in float32, could not tell 0.9999 from 1.
    """
    n, b, bb, d, dd, db = (float(x) for x in moments)
    if n == 0:
        return float("nan")
    var_b, var_d, cov = bb / n - (b / n) ** 2, dd / n - (d / n) ** 2, db / n - (d / n) * (b / n)
    product = var_b * (var_b + 2 * cov + var_d)
    return (var_b + cov) / product**0.5 if product > 0 else float("nan")
