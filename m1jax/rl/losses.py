"""Policy losses as pure functions of log-probabilities, all to be minimised.

With r = π(o) / π_old(o) of a token, A its advantage, sg a stopped gradient, and the sums over all tokens of all replies
(arXiv 2506.13585 for CISPO and the unified form, 2402.03300 for GRPO, 2503.14476 for DAPO):

    REINFORCE   -Σ sg(r) A log π / Σ 1
    PPO, GRPO   -Σ w min(r A, clip(r, floor, cap) A) / Σ w,  w = 1 / |o| of a token of reply o
    DAPO        the same with w = 1 and a cap further from 1 than the floor
    CISPO       -Σ sg(clip(r, floor, cap)) A log π / Σ 1
    unified     -Σ sg(clip(r, floor, cap)) A log π · M / Σ 1,  M = 0 where PPO's clip would stop the gradient

Bounds are absolute values of r: the papers' 1 - ε_low is `floor`, their 1 + ε_high is `cap`. GRPO's KL term, which DAPO
and CISPO do without, is left out.

Letters: B replies, T tokens, G replies of a group.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.errors import UserError

Kind = Literal["reinforce", "ppo", "cispo", "unified"]
MeanOver = Literal["tokens", "replies"]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and its bounds on r.

    Attributes:
      kind: "reinforce", "ppo" (GRPO and DAPO are its settings), "cispo" or "unified".
      floor, cap: bounds of the weight; "reinforce" has none.
      mask_floor, mask_cap: bounds outside which "unified" masks a token.
      mean_over: "tokens", so that long replies count for more, or "replies", which count alike.

    Raises:
      UserError: an unknown kind or mean, or bounds in the wrong order.
    """

    kind: Kind = "cispo"
    floor: float = 0.0
    cap: float = 5.0
    mask_floor: float = 0.8
    mask_cap: float = 1.2
    mean_over: MeanOver = "tokens"

    def __post_init__(self) -> None:
        if self.kind not in ("reinforce", "ppo", "cispo", "unified"):
            raise UserError(f"policy loss {self.kind!r} is unknown: choose from {', '.join(NAMED)}, ppo, unified")
        if self.mean_over not in get_args(MeanOver):
            raise UserError(f"mean_over {self.mean_over!r} is unknown: choose from {', '.join(get_args(MeanOver))}")
        for name, low, high in (("", self.floor, self.cap), ("mask_", self.mask_floor, self.mask_cap)):
            if not 0 <= low <= 1 <= high:
                raise UserError(f"{name}floor {low} and {name}cap {high} must lie on either side of 1 (of r itself)")

    def per_token(self, logp: jax.Array, old_logp: jax.Array, advantage: jax.Array) -> jax.Array:
        """The loss of each token, float32 `[B, T]`, not yet averaged.

        Args:
          logp: float32 `[B, T]`, log π of each token, which the gradient goes through.
          old_logp: float32 `[B, T]`, log π_old, of the policy that generated the token.
          advantage: float32 `[B, T]`, or `[B, 1]`: a reply's tokens share it.
        """
        old_logp, advantage = lax.stop_gradient(old_logp), lax.stop_gradient(advantage)
        if self.kind == "ppo":
            return ppo(logp, old_logp, advantage, self.floor, self.cap)
        if self.kind == "reinforce":
            return reinforce(logp, old_logp, advantage)
        loss = cispo(logp, old_logp, advantage, self.floor, self.cap)
        if self.kind == "unified":
            loss *= trust_mask(logp, old_logp, advantage, self.mask_floor, self.mask_cap)
        return loss


NAMED = {
    "reinforce": PolicyLoss("reinforce"),
    "grpo": PolicyLoss("ppo", floor=0.8, cap=1.2, mean_over="replies"),
    "dapo": PolicyLoss("ppo", floor=0.8, cap=1.28),
    "cispo": PolicyLoss("cispo", floor=0.0, cap=5.0),
}


def ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    """r = π / π_old."""
    return jnp.exp(logp - old_logp)


def reinforce(logp: jax.Array, old_logp: jax.Array, advantage: jax.Array) -> jax.Array:
    """REINFORCE with importance-sampling correction; `PolicyLoss.per_token` has the shapes."""
    return -lax.stop_gradient(ratio(logp, old_logp)) * advantage * logp


def ppo(logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, floor: float, cap: float) -> jax.Array:
    """PPO's clipped objective: no gradient where r has left [floor, cap] in the direction that A asks for."""
    r = ratio(logp, old_logp)
    return -jnp.minimum(r * advantage, jnp.clip(r, floor, cap) * advantage)


def cispo(logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, floor: float, cap: float) -> jax.Array:
    """CISPO: the weight is clipped instead of the update, so that every token keeps a gradient."""
    return -lax.stop_gradient(jnp.clip(ratio(logp, old_logp), floor, cap)) * advantage * logp


def trust_mask(logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, floor: float, cap: float) -> jax.Array:
    """M of the unified form, 0 or 1: 0 where (A > 0 and r > cap) or (A < 0 and r < floor)."""
    r = ratio(logp, old_logp)
    outside = ((advantage > 0) & (r > cap)) | ((advantage < 0) & (r < floor))
    return lax.stop_gradient(jnp.where(outside, 0.0, 1.0))


def weighted_mean(values: jax.Array, weights: jax.Array, total: jax.Array | float | None = None) -> jax.Array:
    """Σ values · weights / `total`.

    Args:
      values: `[B, T]`.
      weights: `[B, T]`, 0 but at generated tokens, whatever the values there. Of 1 (or true) they are token-level
        normalisation, in which long replies count for more; of 1/|o| the mean over replies.
      total: of the weights of the whole batch, where this is a part of it; None is Σ weights.
    """
    out = jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)
    return out / jnp.maximum(jnp.sum(weights) if total is None else total, 1)


def group_advantages(rewards: jax.Array) -> jax.Array:
    """(R - mean) / std of each group, of float32 `[..., G]`; zero where all rewards of a group are equal.

    The standard deviation is that of the group itself (divided by G, not by G - 1).
    """
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    std = jnp.std(rewards, axis=-1, keepdims=True)
    differ = jnp.max(rewards, axis=-1, keepdims=True) > jnp.min(rewards, axis=-1, keepdims=True)
    return jnp.where(differ, centred / jnp.where(std > 0, std, 1.0), 0.0)


def informative(correct: jax.Array) -> jax.Array:
    """Dynamic sampling (DAPO, eq. 11): bool `[...]`, which groups, bool `[..., G]`, have right and wrong answers.

    Other groups' rewards may differ, too, by format or length; their advantages would make much of it.
    """
    return jnp.any(correct, axis=-1) & ~jnp.all(correct, axis=-1)


def overlong_penalty(lengths: jax.Array, window: int, margin: int) -> jax.Array:
    """Soft overlong punishment (DAPO, eq. 13), to be added to the reward: 0 up to -1.

    Args:
      lengths: int32 `[...]`, tokens of each reply.
      window: the most tokens a reply may have.
      margin: over so many last tokens of the window the penalty grows from 0 to -1; 0 is no penalty inside.

    Raises:
      ValueError: the margin is negative or longer than the window.
    """
    if not 0 <= margin <= window:
        raise ValueError(f"margin: must be from 0 to the window of {window} tokens, not {margin}")
    excess = (lengths - (window - margin)) / max(margin, 1)
    return jnp.where(lengths > window, -1.0, -jnp.clip(excess, 0.0, 1.0) if margin else 0.0)
