"""Helpers that several test modules share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.config import M1Config
from m1jax.kernels.gpu import Case
from m1jax.kernels.linear import linear
from m1jax.layers import _mean_of_squares
from m1jax.model import M1, build

DATA = Path(__file__).parent / "data"
TINY = DATA / "m1_tiny"
HELLO = DATA / "m1_hello"  # trained to say one thing, with a tokenizer

needs_jax_011 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax below 0.11 interprets no Mosaic kernels")

TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}  # relative RMS error of a kernel

SMALL = M1Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    rotary_dim=4,
    layer_types=("lightning", "softmax") * 2,
    max_position_embeddings=4096,
    lightning_alpha=1.7,
    softmax_alpha=1.6,
    mlp_alpha=1.5,
    lightning_beta=0.9,
    softmax_beta=1.1,
    mlp_beta=0.8,
)


def rms_error(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference, relative to that of `theirs`."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def random_for_cases(seed: int, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    """What the cases of an op are filled with."""
    rng = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        info = np.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, info.max, shape, dtype, endpoint=True))
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(dtype)


def compare_case(case: Case, implementations: tuple[str, ...], tolerance: float) -> None:
    """Whether the implementations of an op agree with its reference on what `case.call` returns."""
    arguments = case.arguments(random_for_cases)

    def outputs(how: str) -> list[Any]:
        return jax.tree.leaves(jax.jit(lambda given: case.defined(given, case.call(how, given)))(arguments))

    want = outputs("reference")
    for how in implementations:
        for ours, theirs in zip(outputs(how), want, strict=True):
            assert ours.dtype == theirs.dtype
            assert rms_error(ours, theirs) < tolerance, how


def mosaic_races() -> bool:
    """Whether Mosaic's interpreter has seen two warp groups touch a place with nothing in between, since last asked."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    return interpreter.get_races().races_found


def random_model(config: M1Config, seed: int = 0, dtype: str = "float32") -> M1:
    """Random weights, norms away from one."""
    rng = np.random.default_rng(seed)

    def leaf(_: str, spec: Any) -> jax.Array:
        values = rng.standard_normal(spec.shape, dtype=np.float32)
        fan_in = spec.shape[-1] if spec.init is not None else 1
        scaled = values / np.sqrt(fan_in) if spec.init is not None else 1 + 0.2 * values
        return jnp.asarray(scaled).astype(spec.dtype or dtype)

    return build(config, leaf)


def variant(**changes: Any) -> M1Config:
    """SMALL with some fields changed; `num_hidden_layers` follows `layer_types`."""
    if "layer_types" in changes:
        changes["num_hidden_layers"] = len(changes["layer_types"])
    return dataclasses.replace(SMALL, **changes)


def rows_are_alone(few: int, many: int, channels: int) -> bool:
    """Whether this machine makes of few bfloat16 rows the very numbers that it makes of them among many."""
    x, stack = (normal(i, n, channels, dtype="bfloat16") for i, n in enumerate((many, channels)))
    forms = (jax.jit(lambda x: linear(x, stack[None], 0)), jax.jit(_mean_of_squares))
    return all(np.array_equal(form(x)[:few], form(x[:few])) for form in forms)
