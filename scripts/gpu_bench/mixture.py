"""Stages of the experts: the grouped product of a prefill, forward and with gradients, decode, and other tiles."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench.report import BANDWIDTH, PEAKS, Report
from gpu_bench.timing import normal, seconds, seconds_chained
from m1jax.kernels.experts import Quantized, experts, gpu
from m1jax.kernels.experts.quantized import stored_shapes

MUST_SHARE = 0.65  # of the bfloat16 peak, at 8,192 tokens
MUST_TIMES_FLOOR = 1.3  # decode: of the time to read the weights of the chosen experts
STORED: tuple[Any, ...] = (None, "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the stages, and which implementation stands for the kernels."""

    experts: int
    width: int  # F
    hidden: int  # M
    chosen: int
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    triton: Any


M1 = Sizes(32, 9216, 6144, 2, (8192, 1024, 32768), (1, 8, 32, 128), "triton")
DRY = Sizes(4, 32, 64, 2, (20,), (1, 3), "triton_interpreted")


def stack(shape: tuple[int, ...], kind: Any, seed: int) -> Any:
    """Random weights `[..., O, I]`, bfloat16 or quantised, of about the spread of trained ones."""
    scale = shape[-1] ** -0.5
    if kind is None:
        return normal(seed, shape, jnp.bfloat16, scale)
    values, scales = stored_shapes(kind, shape)
    largest = 127 if kind == "int8" else 7
    stored = jnp.int8 if kind == "int8" else jnp.uint8
    return Quantized(normal(seed, values, stored), jnp.full(scales, scale / largest, jnp.float32))


def weights(sizes: Sizes, kind: Any) -> tuple[Any, Any]:
    """gate_up and down of one layer."""
    E, F, M = sizes.experts, sizes.width, sizes.hidden
    return stack((1, E, 2, F, M), kind, 1), stack((1, E, M, F), kind, 2)


def routing(sizes: Sizes, N: int) -> tuple[jax.Array, jax.Array]:
    """Experts and shares of N tokens, uniformly at random."""
    scores = jax.random.uniform(jax.random.key(N), (N, sizes.experts))
    shares, chosen = jax.lax.top_k(scores, sizes.chosen)
    return chosen.astype(jnp.int32), shares


def prefill(report: Report, sizes: Sizes) -> None:
    """Products per second; a gradient is of x, weights and shares, or with quantised weights of x and shares."""
    for kind, N in itertools.product(STORED, sizes.tokens):
        flop = 6 * N * sizes.chosen * sizes.width * sizes.hidden
        must = flop / (MUST_SHARE * PEAKS["data sheet"]) if kind is None and sizes.tokens[0] == N else None
        name = f"{kind or 'bfloat16'} {N} tokens"
        times: dict[str, float] = {}
        w13, w2 = weights(sizes, kind)
        chosen, shares = routing(sizes, N)
        x = normal(5, (N, sizes.hidden))
        for how in (sizes.triton, "xla") if sizes.tokens[0] == N else (sizes.triton,):
            with report.attempt(f"{how} {name}"):

                def run(x: jax.Array, w13: Any, w2: Any, s: jax.Array, how: Any = how, chosen: Any = chosen) -> Any:
                    return experts(x, w13, w2, chosen, s, implementation=how)

                times[how] = seconds(run, x, w13, w2, shares)
                ratio = {} if how == sizes.triton else {"ours_is_faster": times[how] / times.get(sizes.triton, 1e9)}
                report.timed(
                    f"{how} {name}",
                    times[how],
                    None,
                    must if how == sizes.triton else None,
                    **_rates(flop, times[how]),
                    **ratio,
                )
        if sizes.tokens[0] != N or kind == "int4":
            continue
        with report.attempt(f"{sizes.triton} {name}, forward and gradient"):

            def gradient(x: jax.Array, w13: Any, w2: Any, s: jax.Array, chosen: Any = chosen, kind: Any = kind) -> Any:
                def loss(x: jax.Array, s: jax.Array, w13: Any, w2: Any) -> jax.Array:
                    return jnp.sum(experts(x, w13, w2, chosen, s, implementation=sizes.triton))

                return jax.grad(loss, argnums=(0, 1, 2, 3) if kind is None else (0, 1))(x, s, w13, w2)

            time = seconds(gradient, x, w13, w2, shares)
            more = _rates(flop * (3 if kind is None else 2), time)
            report.timed(f"{sizes.triton} {name}, forward and gradient", time, **more)


def _rates(flop: float, time: float) -> dict[str, float]:
    return {"TFLOPs": flop / time / 1e12} | {f"share of {k} peak": flop / time / peak for k, peak in PEAKS.items()}


def decode(report: Report, sizes: Sizes) -> None:
    """One token for each of B rows; the floor reads each chosen expert once."""
    for kind in STORED:
        w13, w2 = weights(sizes, kind)
        each = sum(leaf.nbytes for leaf in jax.tree.leaves((w13, w2))) / sizes.experts
        for B in sizes.batches:
            chosen, shares = routing(sizes, B)
            floor = len(set(jax.device_get(chosen).reshape(-1).tolist())) * each / BANDWIDTH
            for how in (sizes.triton, "xla"):
                with report.attempt(f"{how} {kind or 'bfloat16'} B={B}"):
                    time = _step_seconds(sizes, B, w13, w2, chosen, shares, how)
                    must = MUST_TIMES_FLOOR * floor if how == sizes.triton else None
                    report.timed(f"{how} {kind or 'bfloat16'} B={B}", time, floor, must)


def _step_seconds(sizes: Sizes, B: int, w13: Any, w2: Any, chosen: Any, shares: Any, how: Any) -> float:
    def step(x: jax.Array, w13: Any, w2: Any, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        return experts(x, w13, w2, chosen, shares, implementation=how).astype(x.dtype)

    return seconds_chained(step, normal(5, (B, sizes.hidden)), w13, w2, chosen, shares, steps=32)


def sweep(report: Report, sizes: Sizes) -> None:
    """Other tiles, for both products at once: (rows, out, inner, warps, stages, split)."""
    wide = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (64, 128, 64, 8, 3), (64, 128, 64, 4, 4),
            (128, 64, 64, 4, 4), (128, 64, 64, 8, 4)]  # fmt: skip
    narrow = [(16, 64, 64, 4, 4), (16, 64, 128, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 4), (16, 128, 128, 8, 3),
              (16, 64, 64, 4, 4, 2), (16, 64, 128, 4, 4, 2), (16, 64, 128, 4, 3, 4)]  # fmt: skip
    rounds = [(None, sizes.tokens[0], wide), ("int8", sizes.tokens[0], wide)]
    rounds += [(kind, B, narrow) for kind in STORED for B in (sizes.batches[0], sizes.batches[-1])]
    for kind, N, choices in rounds:
        w13, w2 = weights(sizes, kind)
        chosen, shares = routing(sizes, N)
        x = normal(5, (N, sizes.hidden))
        for choice in choices[: 1 if report.dry else None]:
            down = gpu.Tiles(*choice)
            default = gpu.default_form(N * sizes.chosen, sizes.experts, x.dtype, 0, report.dry)
            form = dataclasses.replace(default, gate_up=dataclasses.replace(down, split=1), down=down)
            name = f"experts {kind or 'bfloat16'} {N} tokens: tiles {choice}"
            with report.attempt(name):

                def run(x: jax.Array, w13: Any, w2: Any, form: Any = form, c: Any = chosen, s: Any = shares) -> Any:
                    return gpu.experts(x, w13, w2, 0, c, s, form=form)

                report.timed(name, seconds(run, x, w13, w2))
