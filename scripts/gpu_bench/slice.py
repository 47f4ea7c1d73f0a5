"""Stage `model`: eight layers of M1 (7 lightning, 1 softmax) at full width with random weights, end to end."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_bench.report import PEAKS, Report
from gpu_bench.timing import normal, operations
from m1jax.config import M1Config
from m1jax.model import M1, abstract, build, final_norm, head, read
from m1jax.params import ParamSpec, param_table
from m1jax.presets import find_config
from m1jax.state import M1State

STEPS = 8  # of a decode between two readings of the clock


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


class Slice:
    """The slice with bfloat16 or quantised experts: its programs, compiled before anything lies on the device."""

    def __init__(self, report: Report, shapes: Sizes, quantize: Any):
        self.report, self.shapes, self.quantize = report, shapes, quantize
        self.name = f"{quantize or 'bfloat16'} experts"
        self.programs: dict[tuple[int, int, int], Any] = {}

    def compile(self) -> None:
        """Compiles a prefill's chunk for each length, and a decode step for each batch."""
        shapes = self.shapes
        model = abstract(shapes.config, quantize=self.quantize)
        calls = [(1, min(T, shapes.chunk), T) for T in shapes.lengths] + [
            (B, 1, shapes.context) for B in shapes.batches
        ]

        def lower(B: int, T: int, N: int) -> Any:
            state = jax.eval_shape(lambda m: m.init_state(B, N), model)
            return _step.lower(model, jax.ShapeDtypeStruct((B, T), jnp.int32), state)

        with ThreadPoolExecutor(len(calls)) as pool:
            jobs = {call: pool.submit(lower(*call).compile) for call in calls}
        for (B, T, N), job in jobs.items():
            with self.report.attempt(f"{self.name}, {B} x {T} tokens into {N}, compiled"):
                self.programs[B, T, N] = job.result()

    def run(self) -> None:
        """Prefill and decode; a profile of both."""
        shapes, report = self.shapes, self.report
        model = random_model(shapes.config, self.quantize)
        for B in shapes.batches:
            with report.attempt(f"{self.name}, decode B={B}"):
                self._decode(model, B)
        for T in shapes.lengths:
            with report.attempt(f"{self.name}, prefill {T}"):
                self._prefill(model, T)
        with report.attempt(f"{self.name}, profile"):
            self._profile(model)

    def _read(self, model: M1, tokens: jax.Array, state: M1State) -> jax.Array:
        T, chunk = tokens.shape[1], min(tokens.shape[1], self.shapes.chunk)
        following = tokens
        for first in range(0, T, chunk):
            following, state = self.programs[1, chunk, T](model, tokens[:, first : first + chunk], state)
        return jax.block_until_ready(following)

    def _tokens(self, B: int, T: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(T).integers(0, self.shapes.config.vocab_size, (B, T)), jnp.int32)

    def _prefill(self, model: M1, T: int) -> None:
        tokens, times = self._tokens(1, T), []
        for _ in range(3):
            state = jax.block_until_ready(model.init_state(1, T))
            start = time.perf_counter()
            self._read(model, tokens, state)
            times.append(time.perf_counter() - start)
        each, cfg = min(times[1:]), self.shapes.config
        active = sum(
            spec.size * (cfg.num_experts_per_tok / cfg.num_local_experts if path.startswith("moe.") else 1)
            for path, spec in param_table(cfg).items()
            if path not in ("embed", "lm_head", "moe.router")
        )
        flop = 2 * T * active + 2 * T * T * cfg.head_dim * cfg.num_attention_heads * len(cfg.softmax_layers)
        share = {f"share of {k} peak": flop / each / peak for k, peak in PEAKS.items()}
        floor = flop / PEAKS["data sheet"]
        self.report.timed(f"{self.name}, prefill {T}", each, floor, tokens_per_second=T / each, **share)

    def _filled(self, model: M1, B: int) -> M1State:
        state = model.init_state(B, self.shapes.context)
        return dataclasses.replace(state, length=jnp.full((B,), self.shapes.context - 64, jnp.int32))

    def _decode(self, model: M1, B: int) -> None:
        state, tokens, times = self._filled(model, B), self._tokens(B, 1), []
        program = self.programs[B, 1, self.shapes.context]
        for _ in range(2 if self.report.dry else 5):
            start = time.perf_counter()
            for _ in range(STEPS):
                tokens, state = program(model, tokens, state)
            jax.block_until_ready(tokens)
            times.append((time.perf_counter() - start) / STEPS)
        cfg, each = self.shapes.config, statistics.median(times[1:])
        reached = 1 - (1 - cfg.num_experts_per_tok / cfg.num_local_experts) ** B  # of the experts, at random
        leaves = jax.tree_util.tree_leaves_with_path(model)
        read = sum(x.nbytes * (reached if "moe" in jax.tree_util.keystr(path) else 1) for path, x in leaves)
        read -= model.embed[...].nbytes
        read += 2 * state.lightning.s.nbytes + 2 * state.cache.k.nbytes
        what = f"{self.name}, decode B={B} at {self.shapes.context}"
        self.report.timed(what, each, read / self.report.bandwidth, tokens_per_second=B / each)

    def _profile(self, model: M1) -> None:
        T = self.shapes.lengths[0]
        tokens = self._tokens(1, T)
        empty = jax.block_until_ready(model.init_state(1, T))
        self._top(f"prefill {T}", lambda: self._read(model, tokens, empty))
        for B in self.shapes.batches[:: len(self.shapes.batches) - 1]:
            one, state = self._tokens(B, 1), self._filled(model, B)
            program = self.programs[B, 1, self.shapes.context]
            self._top(f"decode B={B}", lambda program=program, one=one, state=state: program(model, one, state))

    def _top(self, what: str, call: Callable[[], Any], most: int = 10) -> None:
        found = operations(call)
        for place, (operation, time_of) in enumerate(found[:most], 1):
            self.report.add(f"{self.name}, {what}, top {place}", operation=operation, us=time_of * 1e6)
        self.report.add(f"{self.name}, {what}, all operations", us=sum(time_of for _, time_of in found) * 1e6)


@functools.partial(jax.jit, donate_argnames="state")
def _step(model: M1, tokens: jax.Array, state: M1State) -> tuple[jax.Array, M1State]:
    """The likeliest following tokens `[B, 1]`; the state is given away, so that it is updated where it lies.

    `model.step` without its saving in the last layer, of which a prompt needs little: that is one of M1's 80 layers,
    but one of eight here.
    """
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    x, state, _ = read(model, tokens, state, lengths)
    logits = head(model, final_norm(model, x[:, -1]))
    return jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32), state
