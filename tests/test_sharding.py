"""The model on 8 devices against the model on one: logits, states, gradients, for every way of splitting it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from m1jax.errors import UserError
from m1jax.kernels.experts import quantize
from m1jax.model import M1, build
from m1jax.params import flatten
from m1jax.sharding import experts as parallel
from m1jax.sharding.mesh import MeshShape, Use, make_mesh
from m1jax.sharding.rules import shardings, shards
from m1jax.state import M1State, empty
from m1jax.train.forward import Routing, hidden_states
from m1jax.train.loss import balancing_loss, head_weight, token_log_probs
from m1jax.train.step import computing
from tests.tools import random_model, rms_error, variant

# Sizes that are split in many ways, and are no powers of two: 3 experts of width 15 on a device.
CONFIG = variant(
    vocab_size=56,
    hidden_size=48,
    intermediate_size=60,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=12,
    layer_types=("lightning", "lightning", "softmax") * 2,
    shared_intermediate_size=20,
)
MESHES: dict[str, tuple[str, Use]] = {
    "heads and experts over the same devices": ("expert=2", "serve"),
    "tensor": ("expert=1,tensor=4,data=2", "serve"),
    "experts apart": ("expert=2,tensor=2,data=2", "serve"),
    "sequence": ("seq=4", "serve"),
    "sequence and tensor": ("seq=2,expert=2,tensor=2", "serve"),
    "fsdp": ("fsdp=2,expert=2,tensor=2", "train"),
    "everything but data": ("fsdp=2,seq=2,tensor=2", "train"),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    text, use = MESHES[name]
    shape = MeshShape.parse(text)
    return make_mesh(shape, use, jax.devices()[: shape.size])


@functools.cache
def model() -> M1:
    """Random, with a router that prefers the last experts: tokens have a common direction, which it looks for."""
    with jax.set_mesh(None):  # whoever calls it first: on a mesh it would lie there
        arrays = flatten(random_model(CONFIG))
        arrays["embed"] += 0.3
        arrays["moe.router"] += 0.05 * jnp.arange(CONFIG.num_local_experts, dtype=jnp.float32)[:, None]
        return build(CONFIG, lambda path, _: arrays[path])


def on(mesh: jax.sharding.Mesh) -> M1:
    return jax.device_put(model(), shardings(CONFIG, mesh, model()))


def tokens_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)


TOKENS = tokens_of(4, 19)
# Segments that begin within a device's stretch, at its border, and span several; padding inside and at the end.
SEGMENTS = np.asarray(
    [
        [1] * 3 + [2] * 9 + [3] * 7,
        [1] * 5 + [2] * 5 + [3] * 5 + [4] * 4,
        [1] * 10 + [2] + [0] * 8,
        [7] * 2 + [0] * 2 + [7] * 15,  # an id that comes back is another segment
    ],
    np.int32,
)


def loss(model: M1, segments: np.ndarray | None) -> jax.Array:
    log_p = jax.nn.log_softmax(model(TOKENS, segments))
    valid = np.ones((4, 18)) if segments is None else segments[:, :-1] > 0
    return -jnp.sum(jnp.take_along_axis(log_p[:, :-1], TOKENS[:, 1:, None], axis=2)[..., 0] * valid)


def training_loss(model: M1, segments: np.ndarray, recurrent: bool = False) -> jax.Array:
    hidden, routing = hidden_states(model, TOKENS, segments, recurrent=recurrent)
    log_p, entropy = token_log_probs(hidden, head_weight(model), jnp.roll(TOKENS, -1, axis=1))
    valid = segments > 0
    # The entropy has no gradient, but must be right.
    return -jnp.sum(log_p * valid) + jnp.sum(entropy * valid) + 10 * balancing_loss(routing)


@functools.cache
def expected(kind: str) -> tuple[jax.Array, M1]:
    return jax.jit(jax.value_and_grad(functools.partial(*LOSSES[kind])))(model())


LOSSES: dict[str, Any] = {
    "plain": (lambda segments, model: loss(model, segments), None),
    "packed": (lambda segments, model: loss(model, segments), SEGMENTS),
    "training": (lambda segments, model: training_loss(model, segments), SEGMENTS),
}


def check_gradients(kind: str, name: str) -> None:
    value, gradient = expected(kind)
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        got, ours = jax.jit(jax.value_and_grad(functools.partial(*LOSSES[kind])))(on(mesh))
    assert abs(got - value) < 2e-6 * abs(value)
    pairs: Any = zip(flatten(ours).items(), flatten(gradient).values(), strict=True)
    errors = {path: rms_error(a, b) for (path, a), b in pairs}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", MESHES)
def test_gradients(name: str) -> None:
    """Of the model's logits where it serves, of the trainer's loss where it trains."""
    of_logits = "packed" if "sequence" in name else "plain"
    check_gradients("training" if MESHES[name][1] == "train" else of_logits, name)


def test_gradients_token_by_token() -> None:
    value, gradient = expected("training")
    mesh = mesh_of("everything but data")
    with jax.set_mesh(mesh):
        got, ours = jax.jit(jax.value_and_grad(lambda model: training_loss(model, SEGMENTS, True)))(on(mesh))
    assert abs(got - value) < 2e-6 * abs(value)
    assert rms_error(ours.lightning.qkv_proj[...], gradient.lightning.qkv_proj[...]) < 1e-5


@pytest.mark.parametrize("name", ["experts apart", "everything but data"])
def test_gradients_through_the_exchange_of_many_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What more than FEW rows take; a layer is computed again in the backward pass."""
    monkeypatch.setattr(parallel, "FEW", 0)
    monkeypatch.setattr(parallel, "CHUNK", 7)
    check_gradients("training", name)


@pytest.mark.parametrize("few", [0, parallel.FEW])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_experts(kind: Any, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "FEW", few)
    jax.clear_caches()  # `few` is no argument of the compiled model
    config = dataclasses.replace(CONFIG, layer_types=("lightning",), num_hidden_layers=1)
    config = dataclasses.replace(config, intermediate_size=256)  # two groups of int4
    arrays = flatten(random_model(config))
    for path in ("moe.gate_up", "moe.down"):
        quantized = quantize(arrays.pop(path), kind)
        arrays |= {f"{path}.values": quantized.values, f"{path}.scales": quantized.scales}
    model = build(config, lambda path, _: arrays[path], kind)
    mesh = mesh_of("experts apart")
    with jax.set_mesh(mesh):
        got = jax.device_put(model, shardings(config, mesh, model))(TOKENS)
    assert rms_error(got, model(TOKENS)) < 2e-6


def test_bfloat16_is_no_further_from_float32_than_on_one_device() -> None:
    """Logits and gradients of the trainer's loss; weights and gradients stay float32."""

    def run(model: M1) -> tuple[jax.Array, M1]:
        def narrow(model: M1) -> jax.Array:
            return training_loss(computing(model, "bfloat16"), SEGMENTS)

        return computing(model, "bfloat16")(TOKENS), jax.grad(narrow)(model)

    def named(logits: jax.Array, gradient: M1) -> dict[str, jax.Array]:
        return {"logits": logits, **flatten(gradient)}

    exact, one = named(model()(TOKENS), expected("training")[1]), named(*jax.jit(run)(model()))
    mesh = mesh_of("everything but data")
    with jax.set_mesh(mesh):
        several = named(*jax.jit(run)(on(mesh)))
    for path, value in exact.items():
        assert several[path].dtype == one[path].dtype == jnp.float32
        error = rms_error(several[path], value)
        assert error < 1.5 * rms_error(one[path], value) + 1e-6, path


def in_pages(state: M1State, page: int, mesh: jax.sharding.Mesh) -> M1State:
    """The empty state, with pages of so many tokens, given out from the last one on."""
    _, B, _, N, _ = state.cache.k.shape
    parts = shards(mesh, "batch")
    own = B // parts * N // page
    pages = np.tile(np.arange(own)[::-1].reshape(B // parts, N // page), (parts, 1)).astype(np.int32)
    return dataclasses.replace(empty(CONFIG, "float32", B, parts * own, page), pages=jnp.asarray(pages))


ROOMS = [*((name, 32, None) for name in MESHES), ("sequence", 16, None)]
PAGES = [("experts apart", 32, 8), ("sequence", 32, 32), ("sequence", 16, 16)]


@pytest.mark.parametrize(("name", "room", "page"), [*ROOMS, *PAGES])
def test_logits_states_and_steps(name: str, room: int, page: int | None) -> None:
    """A ragged prefill in two chunks, then two tokens one by one; of the second chunk the last logits.

    A chunk's queries travel to a cache of 32 places, the keys and values of one of 16 to the queries. Caches in pages,
    of which the devices that have other rows have others, give the same.
    """
    lengths = [np.asarray(n, np.int32) for n in ([9, 4, 1, 7], [2, 0, 5, 3], [1, 1, 1, 1], [1, 1, 1, 1])]
    at = np.zeros(4, np.int32)
    mesh, want = mesh_of(name), model()(TOKENS)
    with jax.set_mesh(mesh):
        sharded = on(mesh)
        assert rms_error(sharded(TOKENS), want) < 2e-6
        state = sharded.init_state(4, room)
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(CONFIG, mesh, state)), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
        if page is not None:
            state = in_pages(state, page, mesh)
    plain = model().init_state(4, room)
    for chunk, count in enumerate(lengths):
        T = 1 if count.max() == 1 else 9
        logits = "last" if chunk else "all"
        tokens = np.stack([np.resize(TOKENS[b, at[b] :], T) for b in range(4)])
        at += count
        want, plain = model().step(tokens, plain, count, logits=logits)
        with jax.set_mesh(mesh):
            got, state = sharded.step(tokens, state, count, logits=logits)
        valid = count > 0 if chunk else np.arange(T) < count[:, None]
        assert rms_error(np.asarray(got)[valid], np.asarray(want)[valid]) < 2e-6
    assert rms_error(state.lightning.s, plain.lightning.s) < 2e-6
    for b in range(4):
        if page is None:
            assert rms_error(state.cache.k[:, b, :, : at[b]], plain.cache.k[:, b, :, : at[b]]) < 2e-6
    assert list(state.length) == list(at)


@pytest.mark.parametrize("name", [name for name, (_, use) in MESHES.items() if use == "train"])
def test_the_capacity_drops_the_same_tokens_on_every_mesh(name: str) -> None:
    def run(model: M1) -> tuple[jax.Array, Routing]:
        return hidden_states(model, TOKENS, SEGMENTS, capacity=0.7)

    want, routing = jax.jit(run)(model())
    _, k, E = routing.chosen.shape
    valid = int(np.sum(SEGMENTS > 0))
    # What is beyond the limit of every expert, counted from how often each was chosen.
    limit = np.ceil(0.7 * valid * k / E)
    beyond = np.maximum(np.sum(np.asarray(routing.chosen), axis=1) - limit, 0).sum(axis=1)
    assert np.array_equal(routing.dropped, beyond) and np.all(beyond > 0)
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        got, theirs = jax.jit(run)(on(mesh))
    assert rms_error(np.asarray(got)[SEGMENTS > 0], np.asarray(want)[SEGMENTS > 0]) < 2e-6
    assert np.array_equal(theirs.dropped, routing.dropped) and np.array_equal(theirs.chosen, routing.chosen)


def routed_total(model: M1, routes: np.ndarray | None) -> jax.Array:
    return jnp.sum(hidden_states(model, TOKENS, SEGMENTS, routes=routes)[0][SEGMENTS > 0] ** 3)


@functools.cache
def others_routes() -> tuple[np.ndarray, jax.Array, M1]:
    """Experts in place of the routers' choice, the total with them and its gradient, on one device."""
    L, k, E = CONFIG.num_hidden_layers, CONFIG.num_experts_per_tok, CONFIG.num_local_experts
    every = np.broadcast_to(np.arange(E, dtype=np.uint8), (*TOKENS.shape, L, E))
    others = np.random.default_rng(2).permuted(every, axis=-1)[..., :k]
    return others, *jax.jit(jax.value_and_grad(routed_total))(model(), others)


def test_the_routers_choice_given_back_changes_nothing() -> None:
    own = np.argsort(-model().trace(TOKENS, SEGMENTS).router_logits, axis=-1)[..., : CONFIG.num_experts_per_tok]
    free, same = (jax.jit(routed_total)(model(), routes) for routes in (None, np.moveaxis(own, 0, 2)))
    assert abs(same - free) < 1e-6 * abs(free) < 1e-2 * abs(others_routes()[1] - free)


@pytest.mark.parametrize("name", [name for name, (_, use) in MESHES.items() if use == "train"])
def test_given_experts_in_place_of_the_routers_choice(name: str) -> None:
    others, want, wanted = others_routes()
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        got, ours = jax.jit(jax.value_and_grad(routed_total))(on(mesh), others)
    assert abs(got - want) < 1e-5 * abs(want)
    pairs: Any = zip(flatten(ours).items(), flatten(wanted).values(), strict=True)
    errors = {path: rms_error(a, b) for (path, a), b in pairs if path != "lm_head"}  # which is not read
    assert max(errors.values()) < 1e-5, errors


def test_a_batch_that_the_mesh_does_not_divide_is_refused() -> None:
    mesh = mesh_of("experts apart")
    with jax.set_mesh(mesh):
        sharded = on(mesh)
        with pytest.raises(UserError, match=r"tokens: batch = 3 cannot be split 4 ways .*data=2 × expert=2"):
            sharded(TOKENS[:3])
        with pytest.raises(UserError, match=r"batch = 2 cannot be split 4 ways"):
            sharded.init_state(2, 8)


def test_a_mesh_of_other_axes_is_refused() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="the mesh has axes x"):
        model()(TOKENS)


def test_the_parameters_say_the_mesh_where_none_is_set() -> None:
    """Else every device would gather all experts of all layers: called, inside `jit` and in a gradient."""
    mesh = mesh_of("experts apart")
    sharded, want = on(mesh), model()(TOKENS)
    assert rms_error(sharded(TOKENS), want) < 1e-6
    assert "shard_map" in str(jax.make_jaxpr(lambda m: m(TOKENS))(sharded))
    assert "shard_map" in str(jax.make_jaxpr(jax.grad(lambda m: jnp.sum(m(TOKENS))))(sharded))
    state = sharded.init_state(4, 32)
    sharding = state.lightning.s.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh == mesh
    logits, state = jax.jit(lambda m, tokens, state: m.step(tokens, state))(sharded, TOKENS, state)
    assert rms_error(logits, want) < 1e-6
    assert jax.sharding.get_abstract_mesh().empty
