"""Mosaic's form of the experts in its interpreter, which needs jax 0.11; what it refuses, on any."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import api, experts, gpu, quantize
from m1jax.kernels.experts.cases import CASES, ExpertsCase
from m1jax.kernels.experts.mosaic import BLOCK, Plan, layout
from m1jax.kernels.experts.mosaic import experts as by_mosaic
from m1jax.kernels.gpu.case import reduced
from tests.tools import TOLERANCE, compare_case, mosaic_races, needs_jax_011, normal, rms_error

MOSAIC = [case for case in reduced(CASES) if "mosaic" in case.forms]
L, E, F, M = 2, 5, 192, 128  # out channels end within a tile


def weights_of(dtype: str = "bfloat16", F: int = F, M: int = M) -> Any:
    w13, w2 = normal(1, L, E, 2, F, M, dtype=dtype) / M**0.5, normal(2, L, E, M, F, dtype=dtype) / F**0.5
    return w13.astype(dtype), w2.astype(dtype)


@needs_jax_011
@pytest.mark.parametrize("case", MOSAIC, ids=lambda case: case.name)
def test_cases(case: ExpertsCase) -> None:
    compare_case(case, ("mosaic_interpreted",), TOLERANCE["bfloat16"])
    assert not mosaic_races()


@needs_jax_011
@pytest.mark.parametrize("shared", ["x", "weights", None])
@pytest.mark.parametrize("counts", [(300, 64, 0, 129, 1), (0, 0, 7, 0, 0)])
def test_experts_of_any_number_of_rows(shared: Any, counts: tuple[int, ...]) -> None:
    """None, one, whole blocks and a row more, more tiles than programs and fewer; whatever a pair loads together."""
    chosen = np.repeat(np.arange(E + 1), (*counts, 3))  # three choose nobody
    chosen = jnp.asarray(np.random.default_rng(0).permutation(chosen)[:, None].astype(np.int32))
    x, (w13, w2) = normal(0, chosen.shape[0], M, dtype="bfloat16"), weights_of()
    plan = Plan(shared=shared, stages=2, programs=4)
    run: Any = jax.jit(functools.partial(by_mosaic, plan=plan, interpreted=True))
    got = jnp.where(chosen < E, run(x, w13, w2, jnp.asarray([1], jnp.int32), chosen), 0)
    shares = jnp.ones(chosen.shape)
    # h may be rounded otherwise here and there; a row that is wrong makes an error of 0.04.
    assert rms_error(got, experts(x, w13, w2, chosen, shares, layer=1, implementation="reference")) < 1e-3
    assert not mosaic_races()


@needs_jax_011
def test_gradients_are_those_of_triton() -> None:
    x, weights = normal(0, 70, M, dtype="bfloat16"), weights_of()
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, E + 1, (70, 2)).astype(np.int32))
    shares, into = jnp.abs(normal(3, 70, 2)), normal(4, 70, M)

    def run(how: Any) -> list[jax.Array]:
        def fn(x: jax.Array, weights: Any, shares: jax.Array) -> jax.Array:
            return experts(x, weights[0], weights[1], chosen, shares, layer=1, implementation=how)

        out, vjp = jax.vjp(fn, x, weights, shares)
        return [out, *jax.tree.leaves(vjp(into))]

    for got, want in zip(run("mosaic_interpreted"), run("triton_interpreted"), strict=True):
        assert got.dtype == want.dtype and np.array_equal(got, want)


@pytest.mark.parametrize("most", [2, 4])
def test_the_layout(most: int) -> None:
    """Each row once, no two experts in a block, and the tiles of an expert's blocks in spans that take turns."""
    N, k = 700, 2
    flat = np.random.default_rng(0).choice(E + 1, N * k, p=[0.7, 0.1, 0, 0.05, 0.05, 0.1]).astype(np.int32)
    rows = layout(jnp.asarray(flat.reshape(N, k)), E, most)
    source, place, tiles = map(np.asarray, rows)
    R = source.size
    assert R % BLOCK == 0 and np.all(place[flat == E] == R)
    real = place[flat < E]
    assert np.unique(real).size == real.size and np.array_equal(source[real], (np.arange(N * k) // k)[flat < E])
    of_block = [set(flat[place // BLOCK == block]) - {E} for block in range(R // BLOCK)]
    done = np.zeros(R // BLOCK, int)
    for expert, first, blocks, span, size in tiles:
        assert 0 <= blocks <= most and size >= 1 and (blocks == 0 or first % BLOCK == 0)
        assert np.all(tiles[span : span + size, 3:] == (span, size))
        for block in range(first // BLOCK, first // BLOCK + blocks):
            assert of_block[block] <= {expert}
            done[block] += 1
    assert np.array_equal(done > 0, [bool(found) for found in of_block]) and done.max() == 1


def test_what_it_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.jax, "__version_info__", (0, 11, 0))
    good = weights_of()
    with pytest.raises(ValueError, match="CUDA device"):
        api._choose("mosaic", *good)
    monkeypatch.setattr(api, "refusal", lambda: None)
    assert api._choose("mosaic", *good) == "mosaic" and api._choose(None, *good) == "triton"
    for weights, why in [
        (weights_of("float32"), "gate_up is float32"),
        ((good[0], quantize(good[1], "int8")), "down is int8"),
        (weights_of(F=96), "multiples of 64, got 96 and 128"),
    ]:
        for how in ("mosaic", "mosaic_interpreted"):
            with pytest.raises(ValueError, match=f"implementation: '{how}' cannot run: .*{why}"):
                api._choose(how, *weights)
    monkeypatch.setattr(gpu.jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match=r"jax 0\.11"):
        api._choose("mosaic_interpreted", *good)
