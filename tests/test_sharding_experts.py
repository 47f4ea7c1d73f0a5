"""The forms of the mixture on a mesh against the kernel on one device, at every kind of imbalance."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import experts as kernel
from m1jax.sharding import experts as parallel
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.region import on_mesh
from tests.tools import rms_error, variant

E, F, M, K = 12, 8, 16, 2
CONFIG = variant()

# How the router chooses, for n tokens: int32 [n, K].
ROUTING: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "even": lambda rng, n: np.argsort(rng.random((n, E)), axis=1)[:, :K],
    "skewed": lambda rng, n: np.argsort(rng.random((n, E)) ** (1 + np.arange(E)), axis=1)[:, ::-1][:, :K],
    "all to one device": lambda rng, n: np.tile([E - 2, E - 1], (n, 1)),
    "half of it padding": lambda rng, n: np.where(rng.random((n, 1)) < 0.5, E, ROUTING["even"](rng, n)),
    "nothing but padding": lambda rng, n: np.full((n, K), E),
}
MESHES = {
    "apart": "expert=4,tensor=2",
    "apart along two axes": "seq=2,expert=2,tensor=2",
    "apart and together": "seq=3,expert=2",
    "together": "expert=4",
    "width only": "tensor=8",
    "rows and experts": "data=2,expert=2,tensor=2",
}


APART = ("apart", "apart along two axes", "apart and together", "rows and experts")
CASES = [
    *((mesh, 0, tuple(ROUTING)) for mesh in APART),  # exchanged
    *((mesh, 512, ("skewed",)) for mesh in APART),  # gathered
    *((mesh, 0, ("skewed", "nothing but padding")) for mesh in MESHES if mesh not in APART),
]
TOKENS = ("batch", "sequence", "channel")
AXES = {
    "x": TOKENS,
    "gate_up": ("layer", "experts", "gate_up", "expert_width", "channel"),
    "down": ("layer", "experts", "channel", "expert_width"),
    "chosen": TOKENS,
    "weights": TOKENS,
}
B, T = 8, 6
RNG = np.random.default_rng(3)
X, TARGET = (RNG.standard_normal((B, T, M), dtype=np.float32) for _ in range(2))
GATE_UP = RNG.standard_normal((2, E, 2, F, M), dtype=np.float32)
DOWN = RNG.standard_normal((2, E, M, F), dtype=np.float32)
WEIGHTS = RNG.random((B, T, K), dtype=np.float32)


def flattened(
    form: Callable[..., jax.Array],
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    flat = (a.reshape(-1, a.shape[-1]) for a in (chosen, weights))
    return form(x.reshape(-1, M), gate_up, down, *flat, layer=1).reshape(x.shape)


def with_gradients(form: Callable[..., jax.Array]) -> Callable[[np.ndarray], Any]:
    """Of the experts of each token: outputs, and gradients of x, both weights and the shares."""

    def loss(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = form(*args)
        return jnp.sum(y * TARGET), y

    graded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 4), has_aux=True))

    def run(chosen: np.ndarray) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (_, y), gradients = graded(X, GATE_UP, DOWN, chosen, WEIGHTS)
        return y, gradients

    return run


on_one_device = with_gradients(functools.partial(flattened, kernel))


@pytest.mark.parametrize(("mesh", "few", "routings"), CASES)
def test_every_form_equals_one_device(
    mesh: str, few: int, routings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "FEW", few)
    monkeypatch.setattr(parallel, "CHUNK", 7)  # several chunks, the last one smaller
    shape = MeshShape.parse(MESHES[mesh])
    there = make_mesh(shape, "serve", jax.devices()[: shape.size])
    with jax.set_mesh(there):
        on_several = with_gradients(on_mesh(functools.partial(flattened, parallel.experts), CONFIG, TOKENS, **AXES))
    for routing in routings:
        chosen = ROUTING[routing](np.random.default_rng(4), B * T).astype(np.int32).reshape(B, T, K)
        want, want_gradients = on_one_device(chosen)
        with jax.set_mesh(there):
            got, gradients = on_several(chosen)
        if routing == "nothing but padding":
            assert not np.any(got) and not any(np.any(g) for g in gradients)
            continue
        assert rms_error(got, want) < 2e-6, routing
        for ours, theirs in zip(gradients, want_gradients, strict=True):
            assert rms_error(ours, theirs) < 1e-5, routing


@pytest.mark.parametrize("mesh", ["apart", "together"])
def test_gradients_over_many_chunks_are_summed_in_float32(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that travel in more than one round."""
    monkeypatch.setattr(parallel, "FEW", 0)
    shape = MeshShape.parse(MESHES[mesh])
    there = make_mesh(shape, "serve", jax.devices()[: shape.size])
    rng = np.random.default_rng(5)
    x, target = (rng.standard_normal((8, 128, M), dtype=np.float32) for _ in range(2))
    chosen = ROUTING["skewed"](rng, 8 * 128).astype(np.int32).reshape(8, 128, K)
    shares = rng.random((8, 128, K), dtype=np.float32)

    def gradients(dtype: Any) -> Any:
        with jax.set_mesh(there):
            form = on_mesh(functools.partial(flattened, parallel.experts), CONFIG, TOKENS, **AXES)

            def loss(*weights: jax.Array) -> jax.Array:
                return jnp.sum(form(x.astype(dtype), *weights, chosen, shares) * target)

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(GATE_UP.astype(dtype), DOWN.astype(dtype))

    want, once = gradients(jnp.float32), gradients(jnp.bfloat16)
    monkeypatch.setattr(parallel, "CHUNK", 8)
    for ours, whole, exact in zip(gradients(jnp.bfloat16), once, want, strict=True):
        assert rms_error(ours, exact) < 1.2 * rms_error(whole, exact)
