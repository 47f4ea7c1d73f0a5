"""Quantised experts: rounding, the op on them, and the way from files to a model and back."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax import checkpoint, convert, export
from m1jax.converting import convert as run_convert
from m1jax.errors import UserError
from m1jax.exporting import export as run_export
from m1jax.kernels.experts import Quantized, dequantize, experts, quantize
from m1jax.kernels.experts.quantized import quantize_on_host
from m1jax.loading import load, open_parameters
from m1jax.model import M1, abstract, build
from m1jax.params import flatten, param_table
from m1jax.presets import find_config
from m1jax.sharding.mesh import MeshShape, abstract_mesh
from m1jax.sharding.rules import shardings
from m1jax.verify import verify
from tests.checkpoints import random_tensors, run, write_checkpoint
from tests.tools import TINY, random_model, rms_error, variant

KINDS = ["int8", "int4"]
CONFIG = variant(layer_types=("lightning", "softmax"))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps", "group"), [("int8", 127, 192), ("int4", 7, 64)])
def test_rounding_is_to_the_nearest_step(kind: Any, steps: int, group: int) -> None:
    weights = normal(0, 2, 3, 192)
    quantized = quantize(weights, kind)
    assert quantized.kind == kind and quantized.shape == weights.shape and quantized.group == group
    largest = np.abs(np.asarray(weights)).reshape(2, 3, -1, group).max(-1, keepdims=True)
    error = np.abs(np.asarray(dequantize(quantized) - weights)).reshape(2, 3, -1, group)
    assert np.all(error <= largest / steps / 2 * 1.0001)
    assert np.asarray(quantized.values).nbytes == weights.size * (1 if kind == "int8" else 0.5)
    on_grid = dequantize(quantized)
    np.testing.assert_array_equal(np.asarray(quantize(on_grid, kind).values), np.asarray(quantized.values))


@pytest.mark.parametrize("kind", KINDS)
def test_host_and_device_round_alike(kind: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((5, 300, 384)).astype(jnp.bfloat16)
    values, scales = quantize_on_host(weights, kind)
    there = quantize(jnp.asarray(weights), kind)
    np.testing.assert_array_equal(values, np.asarray(there.values))
    np.testing.assert_array_equal(scales, np.asarray(there.scales))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_and_damage_shows(kind: Any) -> None:
    weights = jnp.zeros((4, 8)).at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
    back = np.asarray(dequantize(quantize(weights, kind)))
    assert not back[0].any() and not back[3].any()
    assert not np.isfinite(back[1]).all() and not np.isfinite(back[2]).all()


def test_what_cannot_be_quantised_is_named() -> None:
    with pytest.raises(ValueError, match="odd"):
        quantize(jnp.zeros((2, 7)), "int4")
    with pytest.raises(ValueError, match="kind"):
        quantize(jnp.zeros((2, 8)), "int2")  # pyright: ignore[reportArgumentType]


# --- the op --------------------------------------------------------------------------------------------------------


def test_scales_have_no_gradient() -> None:
    w13, w2 = quantize(normal(1, 1, 3, 2, 16, 32), "int8"), quantize(normal(2, 1, 3, 32, 16), "int8")
    chosen, weights = jnp.asarray([[0, 1], [2, 1], [1, 0]], jnp.int32), normal(3, 3, 2)

    def loss(scales: jax.Array) -> jax.Array:
        return jnp.sum(experts(normal(0, 3, 32), Quantized(w13.values, scales), w2, chosen, weights) ** 2)

    assert not np.any(jax.jit(jax.grad(loss))(w13.scales))


def test_no_float_copy_of_the_stack() -> None:
    """XLA:CPU likes to convert all layers' weights ahead of the loop."""
    L, E, F, M = 4, 8, 64, 128
    w13, w2 = quantize(normal(1, L, E, 2, F, M), "int8"), quantize(normal(2, L, E, M, F), "int8")
    chosen, weights = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))

    def loop(x: jax.Array, w13: Quantized, w2: Quantized) -> jax.Array:
        return jax.lax.fori_loop(0, L, lambda i, x: experts(x, w13, w2, chosen, weights, layer=i), x)

    memory = jax.jit(loop).lower(normal(0, 2, M), w13, w2).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < w2.values.size


def test_weights_that_do_not_fit_are_named() -> None:
    w13, w2 = quantize(jnp.ones((1, 2, 2, 8, 16)), "int4"), quantize(jnp.ones((1, 2, 16, 8)), "int4")
    args = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    bad = [
        ("down: scales", w13, Quantized(w2.values, w2.scales[..., :3, :])),
        ("gate_up: scales", Quantized(w13.values, w13.scales[0]), w2),
        ("gate_up: expected int8", Quantized(w13.scales, w13.scales), w2),
        ("down: expected", quantize(jnp.ones((1, 2, 2, 8, 32)), "int4"), w2),
    ]
    for name, gate_up, down in bad:
        with pytest.raises(ValueError, match=name):
            experts(jnp.ones((1, gate_up.shape[-1])), gate_up, down, *args)


# --- the model -----------------------------------------------------------------------------------------------------


def quantized_model(model: M1, kind: Any) -> M1:
    """The same model with its experts rounded on the device."""
    leaves: dict[str, Any] = dict(flatten(model))
    for path in ("moe.gate_up", "moe.down"):
        part = quantize(leaves[path], kind)
        leaves |= {f"{path}.values": part.values, f"{path}.scales": part.scales}
    return build(model.config, lambda path, _: leaves[path], kind)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.5)])
def test_logits(kind: Any, bound: float) -> None:
    model = random_model(CONFIG)
    small = quantized_model(model, kind)
    rounded = {f"moe.{name}": dequantize(getattr(small.moe, name)[...]) for name in ("gate_up", "down")}
    same = build(CONFIG, lambda path, _: rounded.get(path, flatten(model)[path]))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 21))
    assert rms_error(small(tokens), same(tokens)) < 3e-6
    assert 1e-4 < rms_error(small(tokens), model(tokens)) < bound
    logits, _ = small.step(tokens, small.init_state(2, 24))
    assert rms_error(logits, same(tokens)) < 3e-6


def test_bytes_of_the_whole_m1() -> None:
    """With int8 experts on eight devices, 59.76 GB each."""
    config = find_config("m1-80k")
    model, mesh = abstract(config, quantize="int8"), abstract_mesh(MeshShape.parse("expert=8"))
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(shardings(config, mesh, model)), strict=True)
    total = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
    assert total == pytest.approx(59.76e9, abs=5e6)
    leaves = flatten(model)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: spec.shape for path, spec in param_table(config, "int8").items()
    }
    assert leaves["moe.down.values"].dtype == jnp.int8 and leaves["moe.down.scales"].dtype == jnp.float32
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) == 477_596_987_392


# --- files ---------------------------------------------------------------------------------------------------------


def tame(x: Any) -> Any:
    """Without the infinities and NaN of random checkpoints, which no logits survive."""
    return np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(0.25))


def same_leaves(ours: M1, theirs: M1) -> None:
    a, b = flatten(ours), flatten(theirs)
    assert a.keys() == b.keys()
    for path, value in b.items():
        assert a[path].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(value), err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["official", "fused"])
def test_load_quantises_and_a_conversion_keeps_it(tmp_path: Path, layout: Any, kind: Any) -> None:
    tensors = random_tensors(CONFIG, ("bfloat16", "float32"), layout)
    source = write_checkpoint(tmp_path / "a", CONFIG, {name: tame(x) for name, x in tensors.items()})
    want = quantized_model(load(source), kind)
    same_leaves(load(source, quantize=kind), want)
    run_convert(source, tmp_path / "b", quantize=kind)
    same_leaves(load(tmp_path / "b"), want)
    same_leaves(load(tmp_path / "b", quantize=kind), want)
    assert checkpoint.read_marker(tmp_path / "b")["quantize"] == kind
    run_convert(source, tmp_path / "c")
    same_leaves(load(tmp_path / "c", quantize=kind), want)
    assert verify(source, tmp_path / "b")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_shard_are_those_of_the_whole(kind: Any) -> None:
    whole = flatten(load(TINY, quantize=kind))
    source = open_parameters(TINY, kind)
    for path, spec in param_table(source.config, kind).items():
        if not path.startswith(("moe.gate_up", "moe.down")):
            continue
        block = tuple(slice(size // 2, size) for size in spec.shape)
        got = source.read(path, spec, block, np.dtype(spec.dtype))
        np.testing.assert_array_equal(got, np.asarray(whole[path])[block])


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "int8"
    assert run(convert, TINY, folder, "--quantize", "int8", monkeypatch=monkeypatch) == 0
    assert run(convert, "--verify", TINY, folder, monkeypatch=monkeypatch) == 0
    assert "experts in int8" in capsys.readouterr().out
    assert run(export, folder, tmp_path / "out", monkeypatch=monkeypatch) == 2
    assert "quantised to int8" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(convert, "--verify", TINY, folder, "--quantize", "int8", monkeypatch=monkeypatch) == 2
    with pytest.raises(UserError, match="int8: int4 needs"):
        load(folder, quantize="int4")
    with pytest.raises(UserError, match="int3"):
        load(TINY, quantize="int3")  # pyright: ignore[reportArgumentType]
    odd = write_checkpoint(tmp_path / "odd", variant(hidden_size=33), random_tensors(variant(hidden_size=33)))
    with pytest.raises(UserError, match="33 is odd"):
        load(odd, quantize="int4")
    with pytest.raises(UserError, match="33 is odd"):
        run_convert(odd, tmp_path / "none", quantize="int4")
    with pytest.raises(UserError, match="quantised"):
        run_export(Path(shutil.copytree(folder, tmp_path / "copy")), tmp_path / "out")
