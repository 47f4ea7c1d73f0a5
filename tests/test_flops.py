"""FLOPs and collectives counted in a jaxpr, against sizes worked out by hand."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

from m1jax.model import M1, abstract
from m1jax.presets import find_config
from m1jax.sharding import peers
from m1jax.sharding.flops import Collective, Cost, count
from tests.tools import SMALL

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)
W = jax.ShapeDtypeStruct((4, 4), jnp.float32)
DOT = 2 * 3 * 4 * 4


def test_products() -> None:
    assert count(lambda x, w: x @ w, X, W) == Cost(matmul=DOT)
    batched = jax.ShapeDtypeStruct((5, 3, 4), jnp.float32)
    assert count(lambda x: jnp.einsum("bij,bkj->bik", x, x), batched).matmul == 2 * 5 * 3 * 3 * 4
    groups, sizes = jax.ShapeDtypeStruct((7, 4, 6), jnp.float32), jax.ShapeDtypeStruct((7,), jnp.int32)
    assert count(lax.ragged_dot, X, groups, sizes).matmul == 2 * 3 * 4 * 6
    image, kernel = jax.ShapeDtypeStruct((1, 2, 9), jnp.float32), jax.ShapeDtypeStruct((5, 2, 3), jnp.float32)
    conv = count(lambda a, b: lax.conv_general_dilated(a, b, (1,), "VALID"), image, kernel)
    assert conv.matmul == 2 * (5 * 7) * (2 * 3)


def test_gradients_of_ragged_products_cost_twice_the_product() -> None:
    groups, sizes = jax.ShapeDtypeStruct((7, 4, 6), jnp.float32), jax.ShapeDtypeStruct((7,), jnp.int32)
    grad = jax.grad(lambda x, w, s: jnp.sum(lax.ragged_dot(x, w, s) ** 2), argnums=(0, 1))
    assert count(grad, X, groups, sizes).matmul == 3 * 2 * 3 * 4 * 6


def test_loops_count_every_turn() -> None:
    def nested(x: jax.Array, w: jax.Array) -> jax.Array:
        inner = lambda x, _: (x @ w, None)  # noqa: E731
        return lax.scan(lambda x, _: lax.scan(inner, x, length=5), x, length=7)[0]

    assert count(nested, X, W).matmul == 35 * DOT
    assert count(jax.grad(lambda x, w: nested(x, w).sum()), X, W).matmul == 2 * 35 * DOT
    assert count(jax.checkpoint(lambda x, w: jnp.sin(x @ w)), X, W) == Cost(matmul=DOT, other=12)
    with pytest.raises(ValueError, match="while loop"):
        count(lambda n: lax.while_loop(lambda i: i < n, lambda i: i + 1, 0), 5)


def test_branches() -> None:
    def either(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w @ w, lambda: x @ w)

    assert count(either, X, W).matmul == 3 * DOT
    assert count(either, X, W, branches="average").matmul == 2 * DOT
    forms = {"cpu": lambda x, w: x @ w @ w @ w, "default": lambda x, w: x @ w}
    assert count(lambda x, w: lax.platform_dependent(x, w, **forms), X, W).matmul == DOT


def test_elementwise_and_reductions() -> None:
    assert count(lambda x: jnp.exp(x) * x + 1, X).other == 3 * 12
    assert count(lambda x: jnp.sum(x, axis=0), X).other == 12
    assert count(lambda x: jnp.cumsum(x, axis=0), X).other == 12
    assert count(lambda x: x.T.reshape(12)[::2].astype(jnp.bfloat16), X).other == 0
    assert count(lambda x, u: x.at[jnp.array([1])].add(u), X, jax.ShapeDtypeStruct((1, 4), jnp.float32)).other >= 4


def test_an_opaque_kernel_is_refused() -> None:
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    with pytest.raises(ValueError, match="pallas_call hides its work"):
        count(pl.pallas_call(kernel, out_shape=X), X)


def test_collectives_and_work_of_all_devices() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec

    def local(x: jax.Array, w: jax.Array) -> jax.Array:  # x [2, 1], w [1, 4]
        y, _ = lax.scan(lambda y, _: (y + lax.psum(x @ w, "b"), None), jnp.zeros((2, 4)), length=3)
        z = lax.all_gather(y, "a")  # [2, 2, 4]
        return lax.psum_scatter(lax.ppermute(z, "b", [(0, 1)]), "a").sum() + lax.pmax(y[0, 0], ("a", "b"))

    function = jax.shard_map(local, mesh=mesh, in_specs=(spec("a", "b"), spec("b")), out_specs=spec(), check_vma=False)
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    cost = count(function, x, x)
    assert cost.matmul == 3 * 2 * 4 * 4 * 4
    both = Collective("pmax", ("a", "b"), 8, 4)
    assert cost.collectives == {
        Collective("psum", ("b",), 4, 32): 3,
        Collective("all_gather", ("a",), 2, 32): 1,
        Collective("ppermute", ("b",), 4, 64): 1,
        Collective("reduce_scatter", ("a",), 2, 64): 1,
        both: 1,
    }
    assert cost.sent == 3 * 2 * 3 / 4 * 32 + 32 + 64 + 32 + 2 * 7 / 8 * 4


def test_decode_step_of_m1_by_hand() -> None:
    config = find_config("m1-80k")
    model = abstract(config, "float32")
    M, H, K, D, F, E, V, N = 6144, 64, 8, 128, 9216, 32, 200_064, 4096
    lightning = 3 * M * H * D + 2 * M * H * D + H * D * D
    softmax = 2 * M * H * D + 2 * M * K * D + 2 * H * D * N
    experts = 80 * (M * E + 2 * 3 * M * F)
    state = jax.eval_shape(lambda m: m.init_state(1, N), model)
    cost = count(lambda m, s, t: m.step(t, s), model, state, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    assert cost.matmul == 2 * (70 * lightning + 10 * softmax + experts + M * V)
    assert cost.other < 0.01 * cost.matmul


def test_gradient_of_the_model_costs_three_forwards() -> None:
    model = abstract(SMALL, "float32")
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    forward = count(lambda m, t: m(t), model, tokens).matmul
    grad = count(jax.grad(lambda m, t: jnp.sum(m(t) ** 2), allow_int=True), model, tokens).matmul
    assert 2.5 * forward < grad < 4.5 * forward


@pytest.mark.parametrize(
    ("step", "active", "per_position"),
    [
        (functools.partial(peers.deepseek_r1, latent=False), 37e9, 61 * 128 * (192 + 128)),
        (functools.partial(peers.deepseek_r1, latent=True), 37e9, 61 * 128 * (576 + 512)),
        (peers.qwen3, 22e9, 94 * 64 * 256),
    ],
)
def test_peers_have_their_published_size(step: Callable[[int], jax.Array], active: float, per_position: int) -> None:
    short, long = count(lambda: step(1)).matmul, count(lambda: step(1025)).matmul
    assert (long - short) / 1024 == 2 * per_position
    assert short / 2 == pytest.approx(active, rel=0.03)


def test_m1_needs_less_than_half_of_r1_at_64k() -> None:
    model = abstract(find_config("m1-80k"), "float32")

    def m1(model: M1, n: int) -> jax.Array:
        return model.step(jnp.zeros((1, 1), jnp.int32), model.init_state(1, n))[0]

    def text(step: Callable[[int], float], n: int) -> float:
        return n * (step(8192) + (n / 2 - 8192) * (step(9216) - step(8192)) / 1024)

    ours = functools.partial(text, lambda n: count(lambda m: m1(m, n), model).flops)
    theirs = functools.partial(text, lambda n: count(lambda: peers.deepseek_r1(n, latent=False)).flops)
    assert 0.44 < ours(65536) / theirs(65536) < 0.45
    assert 0.34 < ours(100_000) / theirs(100_000) < 0.35
