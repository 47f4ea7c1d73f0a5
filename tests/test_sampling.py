"""Filters and sampler of `m1jax.sampling` against a plain NumPy reading of their definitions."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from m1jax import UserError
from m1jax.sampling import (
    Sampling,
    SamplingRows,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
)

V = 37
# Rounding of a probability mass: a token whose mass above lies this close to top-p may fall on either side.
MASS = 1e-5

_filters = jax.jit(filtered)
_top_k, _top_p, _min_p = jax.jit(keep_top_k), jax.jit(keep_top_p), jax.jit(keep_min_p)
_sample = jax.jit(sample)

# Quarters make ties common.
logit_rows = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=V, max_size=V).map(
    lambda row: np.array(row, np.float32)
)


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def mass_above(logits: np.ndarray) -> np.ndarray:
    p = probabilities(logits)
    return np.array([p[logits > x].sum() for x in logits])


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(0, V + 3))
def test_top_k(logits: np.ndarray, k: int) -> None:
    out = np.asarray(_top_k(logits[None], jnp.array([k])))[0]
    kept = np.array([k == 0 or (logits > x).sum() < k for x in logits])
    np.testing.assert_array_equal(out, np.where(kept, logits, -np.inf))


def test_the_smallest_top_p_keeps_the_largest_logit() -> None:
    logits = np.linspace(-3, 3, 50, dtype=np.float32)
    p = Sampling(top_p=float(np.finfo(np.float32).tiny)).top_p
    out = np.asarray(_top_p(logits[None], jnp.array([p], jnp.float32)))[0]
    assert np.flatnonzero(np.isfinite(out)).tolist() == [49]


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.floats(0.0078125, 1, width=32))
def test_top_p(logits: np.ndarray, p: float) -> None:
    out = np.asarray(_top_p(logits[None], jnp.array([p], jnp.float32)))[0]
    above = mass_above(logits)
    must_keep, must_drop = (above < p - MASS) | (p == 1), (above > p + MASS) & (p < 1)
    assert np.all(out[must_keep] == logits[must_keep])
    assert np.all(np.isneginf(out[must_drop]))
    assert out[logits.argmax()] == logits.max()


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.floats(0, 1, width=32))
def test_min_p(logits: np.ndarray, p: float) -> None:
    out = np.asarray(_min_p(logits[None], jnp.array([p], jnp.float32)))[0]
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    assert np.all(out[ratio > p * (1 + MASS)] == logits[ratio > p * (1 + MASS)])
    assert np.all(np.isneginf(out[ratio < p * (1 - MASS)]))
    assert out[logits.argmax()] == logits.max()


@settings(max_examples=30, deadline=None)
@given(logit_rows, st.floats(0.5, 2, width=32), st.sets(st.integers(0, V - 1)))
def test_repetition_penalty(logits: np.ndarray, penalty: float, seen: set[int]) -> None:
    mask = np.isin(np.arange(V), list(seen))
    out = penalise_repetition(jnp.array(logits[None]), jnp.array(mask[None]), jnp.array([penalty]))
    expected = np.where(mask, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    np.testing.assert_allclose(np.asarray(out)[0], expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    logit_rows, st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 9), st.sampled_from([0.3, 0.77, 1.0]), st.booleans()
)
def test_filters_in_order(logits: np.ndarray, temperature: float, k: int, p: float, floor: bool) -> None:
    """Each filter reads the distribution that the one before left, renormalised."""
    min_p = 0.051 if floor else 0.0
    rows = SamplingRows.of([(Sampling(temperature, k, p, min_p), 0, 0)])
    out = np.asarray(_filters(logits[None], rows, jnp.zeros((1, V), bool)))[0]
    scaled = (logits - logits.max()) / np.float32(temperature)
    kept = np.array([k == 0 or (scaled > x).sum() < k for x in scaled])
    above = mass_above(np.where(kept, scaled, -np.inf))
    if np.any(np.abs(above[kept] - p) < MASS):
        return
    kept &= (above < p) | (p == 1)
    kept &= np.exp(scaled - scaled.max()) >= min_p
    np.testing.assert_allclose(out, np.where(kept, scaled, -np.inf), rtol=1e-6)


def test_greedy_row_is_the_first_largest() -> None:
    logits = np.array([[0, 3, 1, 3], [-1, -2, -1, -3]], np.float32)
    rows = SamplingRows.of([(Sampling(temperature=0), 0, 0), (Sampling(temperature=0, top_k=1), 5, 1)])
    assert list(_sample(logits, rows, jnp.zeros(2, jnp.int32), jnp.zeros((2, 4), bool))) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-4])
@pytest.mark.parametrize("filters", [{}, {"top_p": 1.0}, {"top_k": 3, "min_p": 0.1}])
def test_the_smallest_temperatures_are_greedy(temperature: float, filters: dict[str, float]) -> None:
    logits = np.array([[0, 3, 50, 7], [-9, -2, -7, -3], [100, 101, 102, 103]], np.float32)
    rows = SamplingRows.of([(Sampling(temperature, **filters), 0, i) for i in range(3)])  # pyright: ignore
    got = _sample(logits, rows, jnp.zeros(3, jnp.int32), jnp.zeros((3, 4), bool))
    assert list(got) == [2, 1, 3]


def test_greedy_follows_the_repetition_penalty() -> None:
    rows = SamplingRows.of([(Sampling(temperature=0, repetition_penalty=2.0), 0, 0)])
    seen = jnp.array([[False, True, False]])
    assert int(_sample(jnp.array([[1.9, 3.0, 0.0]]), rows, jnp.zeros(1, jnp.int32), seen)[0]) == 0


def test_draws_follow_the_probabilities() -> None:
    """A chi-squared test over 4,000 positions; the bound is far in the tail."""
    n = 4000
    logits = np.array([1.0, 0.5, 0.0, -0.5, -1.0, -9.0], np.float32)
    rows = SamplingRows.of([(Sampling(temperature=0.7, top_p=1.0), 11, 0)] * n)
    out = _sample(np.tile(logits, (n, 1)), rows, jnp.arange(n), jnp.zeros((n, len(logits)), bool))
    expected = n * probabilities(logits / 0.7)
    counts = np.bincount(np.asarray(out), minlength=len(logits))
    assert np.sum((counts - expected)[:-1] ** 2 / expected[:-1]) < 30
    assert counts[-1] <= 3


def test_a_row_draws_the_same_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, V)).astype(np.float32)
    settings_of = [(Sampling(top_k=i, top_p=0.4 + i / 10), 7 + i % 2, i // 2) for i in range(6)]
    position = np.arange(6, dtype=np.int32) * 3
    seen = rng.random((6, V)) < 0.3
    together = _sample(logits, SamplingRows.of(settings_of), position, seen)
    for i in range(6):
        alone = _sample(
            logits[i : i + 1], SamplingRows.of(settings_of[i : i + 1]), position[i : i + 1], seen[i : i + 1]
        )
        assert int(alone[0]) == int(together[i])


def test_seed_sample_and_position_each_matter() -> None:
    def draws(seed: int, index: int, start: int) -> list[int]:
        rows = SamplingRows.of([(Sampling(top_p=1.0), seed, index)] * 40)
        position = jnp.arange(start, start + 40)
        return np.asarray(_sample(jnp.zeros((40, V)), rows, position, jnp.zeros((40, V), bool))).tolist()

    base = draws(0, 0, 0)
    assert base == draws(0, 0, 0)
    assert base[1:] == draws(0, 0, 1)[:-1]
    assert base != draws(1, 0, 0) and base != draws(0, 1, 0) and draws(1, 0, 0) != draws(0, 1, 0)
    assert draws(2**32 - 1, 0, 0) != base


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), 1e39, 10**400)),
        *(("top_p", value) for value in (0.0, 1e-46, 1.01, float("nan"), 10**400)),
        *(("min_p", value) for value in (-0.5, 1.5, -(10**400))),
        *(("top_k", value) for value in (-1, 10**400)),
        *(("repetition_penalty", value) for value in (0.0, float("nan"), 1e39, 10**400)),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=setting.replace("_", "-")) as caught:
        Sampling(**{setting: value})  # pyright: ignore[reportArgumentType]
    assert len(str(caught.value)) < 150
