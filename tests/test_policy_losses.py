"""Policy losses: values worked by hand, gradients by finite differences, and no gradient through the weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl import losses
from m1jax.rl.losses import NAMED, PolicyLoss
from tests.tools import rms_error

LOSSES = {**NAMED, "unified": PolicyLoss("unified", floor=0.0, cap=5.0, mask_floor=0.8, mask_cap=1.2)}


def table(ratios: list[float], old: float = -1.0) -> tuple[jax.Array, jax.Array]:
    """logp and old logp `[1, T]` with these ratios."""
    old_logp = jnp.full((1, len(ratios)), old)
    return old_logp + jnp.log(jnp.asarray([ratios])), old_logp


# One token with π_old = e⁻¹; r, A, and the loss by hand: log π = -1 + log r.
HALF, TWO, TEN = -1 + math.log(0.5), -1 + math.log(2), -1 + math.log(10)
GOLDEN = [
    ("reinforce", 0.5, 1.0, -0.5 * HALF),
    ("reinforce", 10.0, 2.0, -10 * 2 * TEN),
    ("grpo", 2.0, 1.0, -1.2),  # clipped
    ("grpo", 2.0, -1.0, 2.0),  # the worse of both: not clipped
    ("grpo", 0.5, 1.0, -0.5),
    ("grpo", 0.5, -1.0, 0.8),  # clipped at the floor
    ("dapo", 2.0, 1.0, -1.28),
    ("dapo", 1.25, 1.0, -1.25),  # GRPO would have clipped
    ("dapo", 0.5, -1.0, 0.8),
    ("cispo", 0.5, 1.0, -0.5 * HALF),
    ("cispo", 2.0, 1.0, -2 * TWO),
    ("cispo", 10.0, 1.0, -5 * TEN),  # the weight stops at 5, the gradient does not
    ("cispo", 10.0, -1.0, 5 * TEN),
    ("unified", 2.0, 1.0, 0.0),  # masked
    ("unified", 2.0, -1.0, 2 * TWO),
    ("unified", 0.5, -1.0, 0.0),  # masked
    ("unified", 0.5, 1.0, -0.5 * HALF),
]


@pytest.mark.parametrize(("name", "r", "advantage", "expected"), GOLDEN)
def test_values_by_hand(name: str, r: float, advantage: float, expected: float) -> None:
    logp, old = table([r])
    value = LOSSES[name].per_token(logp, old, jnp.asarray([[advantage]]))
    np.testing.assert_allclose(float(value[0, 0]), expected, rtol=2e-6, atol=1e-7)


def random_case(seed: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """logp, old logp, advantages and mask; no ratio within 0.02 of a bound, where a clip has a corner."""
    rng = np.random.default_rng(seed)
    ratios = np.exp(rng.normal(scale=0.7, size=(4, 9)))
    for bound in (0.8, 1.2, 1.28, 5.0):
        ratios = np.where(np.abs(ratios - bound) < 0.02, bound + 0.05, ratios)
    old = rng.uniform(-3, -0.1, (4, 9))
    mask = jnp.asarray(rng.random((4, 9)) < 0.8)
    return jnp.asarray(old + np.log(ratios)), jnp.asarray(old), jnp.asarray(rng.normal(size=(4, 1))), mask


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradient_by_finite_differences(name: str) -> None:
    with jax.enable_x64(True):
        logp, old, advantage, mask = random_case(3)

        def frozen(x: jax.Array) -> jax.Array:
            """The loss with its weights held at `logp`; PPO's ratio is the objective itself, not a weight."""
            if LOSSES[name].kind == "ppo":
                per_token = LOSSES[name].per_token(x, old, advantage)
            else:
                # Every other loss is -weight · A · log π, so that the weight is the loss of log π = 1 at these ratios.
                weight = LOSSES[name].per_token(logp, old, advantage) / logp
                per_token = weight * x
            return losses.weighted_mean(per_token, mask)

        def loss(x: jax.Array) -> jax.Array:
            return losses.weighted_mean(LOSSES[name].per_token(x, old, advantage), mask)

        gradient, step = jax.grad(loss)(logp), 1e-6
        numeric = np.zeros(logp.shape)
        for index in np.ndindex(*logp.shape):
            bump = jnp.zeros_like(logp).at[index].set(step)
            numeric[index] = (frozen(logp + bump) - frozen(logp - bump)) / (2 * step)
        assert rms_error(gradient, numeric) < 1e-7
        assert float(jnp.abs(gradient[~mask]).max()) == 0


@pytest.mark.parametrize("name", ["reinforce", "cispo", "unified"])
def test_no_gradient_flows_through_the_weight(name: str) -> None:
    """The gradient is -weight · A exactly; a weight that were differentiated would add log π · dw."""
    logp, old = table([0.5, 1.1, 3.0, 10.0])
    r = np.exp(np.asarray(logp - old))
    weight = {
        "reinforce": r,
        "cispo": np.clip(r, 0, 5),
        "unified": np.clip(r, 0, 5) * (r <= 1.2),
    }[name]
    gradient = jax.grad(lambda x: LOSSES[name].per_token(x, old, jnp.asarray([[1.0]])).sum())(logp)
    np.testing.assert_allclose(gradient, -weight, rtol=1e-6)
    through = jax.grad(lambda x: (-losses.ratio(x, old) * x).sum())(logp)  # what it would be without the stop
    assert rms_error(gradient, through) > 0.1


def test_ppo_stops_where_cispo_goes_on() -> None:
    logp, old = table([2.0])
    gradient = {
        name: float(jax.grad(lambda x, loss=loss: loss.per_token(x, old, jnp.asarray([[1.0]])).sum())(logp)[0, 0])
        for name, loss in LOSSES.items()
    }
    assert gradient["grpo"] == gradient["dapo"] == gradient["unified"] == 0
    np.testing.assert_allclose(gradient["cispo"], -2.0, rtol=1e-6)


def test_nothing_is_differentiated_but_the_policy() -> None:
    logp, old = table([0.9, 1.1])
    for loss in LOSSES.values():
        gradients = jax.grad(lambda o, a, loss=loss: loss.per_token(logp, o, a).sum(), argnums=(0, 1))(
            old, jnp.ones((1, 1))
        )
        assert all(float(jnp.abs(g).max()) == 0 for g in gradients)


def test_all_losses_agree_on_policy() -> None:
    """At r = 1 every gradient is that of -A log π."""
    logp, old = table([1.0, 1.0])
    advantage = jnp.asarray([[1.5, -0.5]])
    for loss in LOSSES.values():
        gradient = jax.grad(lambda x, loss=loss: loss.per_token(x, old, advantage).sum())(logp)
        np.testing.assert_allclose(gradient, -advantage, rtol=1e-6)


def test_group_advantages_by_hand() -> None:
    # mean 0.25, deviations 0.75, -0.25, -0.25, -0.25; variance (0.5625 + 3 · 0.0625) / 4 = 0.1875
    expected = np.asarray([0.75, -0.25, -0.25, -0.25]) / math.sqrt(0.1875)
    rewards = jnp.asarray([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]])
    np.testing.assert_allclose(losses.group_advantages(rewards), [expected, np.zeros(4)], rtol=1e-6)


def test_groups_that_teach_have_right_and_wrong_answers() -> None:
    """Whatever their rewards: all wrong at different lengths, or all right with one in a bad format, teach nothing."""
    correct = jnp.asarray([[True, False, False], [False] * 3, [True] * 3])
    assert losses.informative(correct).tolist() == [True, False, False]


def test_token_level_normalisation_by_hand() -> None:
    values = jnp.asarray([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
    mask = jnp.asarray([[True, True, True], [True, False, False]])
    assert float(losses.weighted_mean(values, mask)) == 4.0  # (1 + 2 + 3 + 10) / 4, not (2 + 10) / 2
    assert float(losses.weighted_mean(values, mask, total=8)) == 2.0
    assert float(losses.weighted_mean(values, jnp.zeros_like(mask))) == 0.0
    nan = jnp.where(mask, values, jnp.nan)  # padding never matters
    assert float(losses.weighted_mean(nan, mask)) == 4.0
    each = jnp.asarray([[1 / 3, 1 / 3, 1 / 3], [1.0, 0, 0]])  # the mean of the replies' means
    assert float(losses.weighted_mean(nan, each)) == 6.0  # (2 + 10) / 2


def test_overlong_penalty_by_hand() -> None:
    lengths = jnp.asarray([10, 80, 85, 90, 95, 100, 101])
    expected = [0, 0, -0.25, -0.5, -0.75, -1, -1]
    np.testing.assert_allclose(losses.overlong_penalty(lengths, window=100, margin=20), expected)
    np.testing.assert_allclose(losses.overlong_penalty(lengths, window=100, margin=0), [0, 0, 0, 0, 0, 0, -1])
    with pytest.raises(ValueError, match="margin"):
        losses.overlong_penalty(lengths, window=10, margin=20)


def test_bounds_are_those_of_the_ratio_itself() -> None:
    with pytest.raises(UserError, match=r"cap 0\.28"):
        PolicyLoss("ppo", floor=0.2, cap=0.28)  # a reader of the papers might write ε
    with pytest.raises(UserError, match="unknown"):
        PolicyLoss("pppo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="mean_over 'words' is unknown: choose from tokens, replies"):
        PolicyLoss(mean_over="words")  # pyright: ignore[reportArgumentType]
