"""Stage `model`: eight layers of M1 (7 lightning, 1 softmax) at full width with random weights, end to end."""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_bench.report import PEAKS, Report
from gpu_bench.timing import normal, top_operations
from m1jax.config import M1Config
from m1jax.model import M1, M1State, build
from m1jax.params import ParamSpec, param_table
from m1jax.presets import find_config


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the stage."""

    config: M1Config
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    chunk: int  # tokens of a prefill read at once


def sizes(dry: bool) -> Sizes:
    """M1's first period, or that of a tiny model."""
    full = find_config("m1-80k")
    config = dataclasses.replace(full, num_hidden_layers=8, layer_types=full.layer_types[:8])
    if not dry:
        return Sizes(config, (8192, 32768, 131072), (1, 32, 128), 32768, 32768)
    tiny = dataclasses.replace(
        config, vocab_size=64, hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, rotary_dim=16, num_local_experts=4,
    )  # fmt: skip
    return Sizes(tiny, (16,), (1, 2), 256, 8)


def random_model(config: M1Config, quantize: Any) -> M1:
    """Random weights, made on the device one parameter at a time."""

    def leaf(path: str, spec: ParamSpec) -> jax.Array:
        dtype = jnp.dtype(spec.dtype or "bfloat16")
        if path.endswith(".scales"):
            return jnp.full(spec.shape, 0.02 / (127 if quantize == "int8" else 7), dtype)
        if spec.init is None:
            return jnp.ones(spec.shape, dtype)
        return normal(sum(map(ord, path)), spec.shape, dtype, 0.02)

    return build(config, leaf, quantize)


def run(report: Report, shapes: Sizes) -> None:
    """Prefill and decode with bfloat16 and with int8 experts; a profile of both."""
    for quantize in (None, "int8"):
        name = f"{quantize or 'bfloat16'} experts"
        with report.attempt(name):
            model = random_model(shapes.config, quantize)
            for T in shapes.lengths:
                with report.attempt(f"{name}, prefill {T}"):
                    _prefill(report, shapes, model, name, T)
            for B in shapes.batches:
                with report.attempt(f"{name}, decode B={B}"):
                    _decode(report, shapes, model, name, B)
            with report.attempt(f"{name}, profile"):
                _profile(report, shapes, model, name)
            del model


@functools.partial(jax.jit, donate_argnames="state")
def _step(model: M1, tokens: jax.Array, state: M1State) -> tuple[jax.Array, M1State]:
    """As `m1jax.rows` steps: the state is given away, so that it is updated where it lies."""
    return model.step(tokens, state, logits="last")


def _read(shapes: Sizes, model: M1, tokens: jax.Array, state: M1State) -> jax.Array:
    logits = jnp.zeros(())
    for first in range(0, tokens.shape[1], shapes.chunk):
        logits, state = _step(model, tokens[:, first : first + shapes.chunk], state)
    return jax.block_until_ready(logits)


def _tokens(shapes: Sizes, B: int, T: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(T).integers(0, shapes.config.vocab_size, (B, T)), jnp.int32)


def _prefill(report: Report, shapes: Sizes, model: M1, name: str, T: int) -> None:
    tokens, times = _tokens(shapes, 1, T), []
    for _ in range(4):
        state = jax.block_until_ready(model.init_state(1, T))
        start = time.perf_counter()
        _read(shapes, model, tokens, state)
        times.append(time.perf_counter() - start)
    each, cfg = statistics.median(times[1:]), shapes.config
    active = sum(
        spec.size * (cfg.num_experts_per_tok / cfg.num_local_experts if path.startswith("moe.") else 1)
        for path, spec in param_table(cfg).items()
        if path not in ("embed", "lm_head", "moe.router")
    )
    flop = 2 * T * active + 2 * T * T * cfg.head_dim * cfg.num_attention_heads * len(cfg.softmax_layers)
    share = {f"share of {k} peak": flop / each / peak for k, peak in PEAKS.items()}
    report.timed(f"{name}, prefill {T}", each, flop / PEAKS["data sheet"], tokens_per_second=T / each, **share)


def _filled(shapes: Sizes, model: M1, B: int) -> M1State:
    state = model.init_state(B, shapes.context)
    return dataclasses.replace(state, length=jnp.full((B,), shapes.context - 32, jnp.int32))


def _decode(report: Report, shapes: Sizes, model: M1, name: str, B: int) -> None:
    state, tokens, times = _filled(shapes, model, B), _tokens(shapes, B, 1), []
    for _ in range(4 if report.dry else 24):
        start = time.perf_counter()
        logits, state = _step(model, tokens, state)
        tokens = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
        jax.block_until_ready(tokens)
        times.append(time.perf_counter() - start)
    cfg, each = shapes.config, statistics.median(times[2:])
    reached = 1 - (1 - cfg.num_experts_per_tok / cfg.num_local_experts) ** B  # of the experts, at random
    leaves = jax.tree_util.tree_leaves_with_path(model)
    read = sum(x.nbytes * (reached if "moe" in jax.tree_util.keystr(path) else 1) for path, x in leaves)
    read -= model.embed[...].nbytes
    read += 2 * state.lightning.s.nbytes + 2 * state.cache.k.nbytes
    report.timed(f"{name}, decode B={B} at {shapes.context}", each, read / report.bandwidth, tokens_per_second=B / each)


def _profile(report: Report, shapes: Sizes, model: M1, name: str) -> None:
    T, B = shapes.lengths[0], shapes.batches[-1]
    state, tokens = _filled(shapes, model, B), _tokens(shapes, B, 1)

    def prefill() -> Any:
        return _read(shapes, model, _tokens(shapes, 1, T), model.init_state(1, T))

    def decode() -> Any:
        nonlocal state
        logits, state = _step(model, tokens, state)
        return logits

    for what, fn in ((f"prefill {T}", prefill), (f"decode B={B}", decode)):
        jax.block_until_ready(fn())
        found = top_operations(fn)
        for place, (operation, time_of) in enumerate(found, 1):
            report.add(f"{name}, {what}, top {place}", operation=operation, us=time_of * 1e6)
