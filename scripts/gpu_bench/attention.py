"""Stages of the two attentions: lightning forward, backward and decode, softmax prefill, gradient and decode."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench import fla
from gpu_bench.report import BANDWIDTH, Report
from gpu_bench.timing import normal, seconds, seconds_chained
from m1jax.kernels.lightning_attention import gpu, lightning_attention, log_decay
from m1jax.kernels.softmax_attention import softmax_attention

MUST = {8192: (200e-6, 600e-6), 32768: (800e-6, 2400e-6), 131072: (3200e-6, 9600e-6), 2**20: (25600e-6, 76700e-6)}
MUST_STEP = {1: 5e-6, 32: 75e-6, 128: 290e-6}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the stages, and which implementation stands for the kernels."""

    heads: int
    key_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    softmax_lengths: tuple[int, ...]
    caches: tuple[tuple[int, int], ...]  # (batch, length)
    triton: Any
    cudnn: Any
    pallas: Any


M1 = Sizes(
    64, 8, 128, (8192, 32768, 131072, 2**20), (1, 32, 128), (8192, 32768, 131072),
    ((1, 32768), (32, 32768), (1, 2**20)), "triton", "cudnn", "pallas",
)  # fmt: skip
DRY = Sizes(2, 1, 32, (64,), (1, 2), (32,), ((1, 256),), "triton_interpreted", "xla", "pallas_interpreted")


def _decay(sizes: Sizes) -> jax.Array:
    return jnp.asarray(log_decay(sizes.heads, 35, 80))


def _qkv(sizes: Sizes, B: int, T: int) -> jax.Array:
    return normal(1, (B, T, sizes.heads, 3, sizes.head_dim))


def forward(report: Report, sizes: Sizes) -> None:
    """Lightning attention of one long row, beside fla and plain XLA."""
    for T in sizes.lengths:
        floor = 1024 / 128 * sizes.head_dim * sizes.heads * T / BANDWIDTH
        times: dict[str, float] = {}
        for name in (sizes.triton, "xla"):
            with report.attempt(f"{name} {T}"):
                run = functools.partial(lightning_attention, log_decay=_decay(sizes), implementation=name)
                times[name] = seconds(lambda qkv, run=run: run(qkv)[0], _qkv(sizes, 1, T))
        with report.attempt(f"fla chunk_simple_gla {T}"):
            decay = jax.device_get(_decay(sizes))
            times["fla"] = fla.chunk_simple_gla(T, sizes.heads, sizes.head_dim, decay, False)
        _rows(report, T, times, sizes.triton, floor, MUST.get(T, (None, None))[0])


def backward(report: Report, sizes: Sizes) -> None:
    """Gradients of qkv and of the initial state, without the forward pass."""
    for T in sizes.lengths:
        floor = 2560 / 128 * sizes.head_dim * sizes.heads * T / BANDWIDTH
        times: dict[str, float] = {}
        for name in (sizes.triton, "xla"):
            with report.attempt(f"{name} {T}"):
                times[name] = _gradient_seconds(sizes, T, name)
        with report.attempt(f"fla chunk_simple_gla {T}"):
            decay = jax.device_get(_decay(sizes))
            times["fla"] = fla.chunk_simple_gla(T, sizes.heads, sizes.head_dim, decay, True)
        _rows(report, T, times, sizes.triton, floor, MUST.get(T, (None, None))[1])


def _gradient_seconds(sizes: Sizes, T: int, name: Any) -> float:
    state = jnp.zeros((1, sizes.heads, sizes.head_dim, sizes.head_dim), jnp.float32)

    def gradient(qkv: jax.Array, state: jax.Array, into: jax.Array) -> Any:
        def out(qkv: jax.Array, state: jax.Array) -> jax.Array:
            return lightning_attention(qkv, _decay(sizes), state=state, implementation=name)[0]

        # Nothing uses the output, so the compiler leaves the forward pass out.
        return jax.vjp(out, qkv, state)[1](into)

    into = normal(2, (1, T, sizes.heads, sizes.head_dim))
    return seconds(gradient, _qkv(sizes, 1, T), state, into)


def _rows(report: Report, T: int, times: dict[str, float], ours: str, floor: float, must: float | None) -> None:
    for name, time in times.items():
        goal = must if name == ours else None
        ratio = {"ours_is_faster": time / times[ours]} if ours in times and name != ours else {}
        report.timed(f"{name} {T}", time, floor, goal, **ratio)


def decode(report: Report, sizes: Sizes) -> None:
    """One token for each of B rows, the state of one layer updated in place."""
    for B in sizes.batches:
        shape = (1, B, sizes.heads, sizes.head_dim, sizes.head_dim)
        floor = 2 * 4 * B * sizes.heads * sizes.head_dim**2 / BANDWIDTH
        for name in (sizes.triton, "xla"):
            with report.attempt(f"{name} B={B}"):

                def step(carry: Any, qkv: jax.Array, name: Any = name) -> Any:
                    states, _ = carry
                    out, states = lightning_attention(qkv, _decay(sizes), state=states, layer=0, implementation=name)
                    return states, out

                out = jnp.zeros((B, 1, sizes.heads, sizes.head_dim), jnp.bfloat16)
                carry = normal(3, shape, jnp.float32), out
                time = seconds_chained(step, carry, _qkv(sizes, B, 1))
                report.timed(f"{name} B={B}", time, floor, MUST_STEP.get(B) if name == sizes.triton else None)


def softmax(report: Report, sizes: Sizes) -> None:
    """Causal attention of one row, forward and with gradients; then one token into a cache."""
    H, K, D = sizes.heads, sizes.key_heads, sizes.head_dim
    for T in sizes.softmax_lengths:
        q, k, v = normal(1, (1, T, H, D)), normal(2, (1, K, T, D)), normal(3, (1, K, T, D))
        for name in dict.fromkeys((sizes.cudnn, "xla")):
            run = functools.partial(softmax_attention, implementation=name)
            flop = 2 * T * T * D * H  # causal: half of two products

            def gradient(q: jax.Array, k: jax.Array, v: jax.Array, into: jax.Array, run: Any = run) -> Any:
                return jax.vjp(run, q, k, v)[1](into)

            with report.attempt(f"{name} forward {T}"):
                time = seconds(run, q, k, v)
                report.timed(f"{name} forward {T}", time, TFLOPs=flop / time / 1e12)
            if sizes.softmax_lengths[0] >= T:
                with report.attempt(f"{name} forward and gradient {T}"):
                    time = seconds(gradient, q, k, v, q)
                    report.timed(f"{name} forward and gradient {T}", time, TFLOPs=3.5 * flop / time / 1e12)
            chunk = T // 4
            with report.attempt(f"{name} last quarter of {T}"):
                time = seconds(lambda *a, run=run, at=T - chunk: run(*a, offset=jnp.asarray([at])), q[:, -chunk:], k, v)
                report.timed(f"{name} last quarter of {T}", time, TFLOPs=flop * 7 / 16 / time / 1e12)
    for B, N in sizes.caches:
        k, v = normal(2, (B, K, N, D)), normal(3, (B, K, N, D))
        for name in dict.fromkeys((sizes.pallas, sizes.cudnn, "xla")):
            with report.attempt(f"{name} decode B={B} of {N}"):

                def step(q: jax.Array, k: jax.Array, v: jax.Array, name: Any = name, N: int = N, B: int = B) -> Any:
                    return softmax_attention(q, k, v, offset=jnp.full((B,), N - 1), implementation=name)

                time = seconds_chained(step, normal(1, (B, 1, H, D)), k, v, steps=16)
                report.timed(f"{name} decode B={B} of {N}", time, 4 * B * K * N * D / BANDWIDTH)


def sweep(report: Report, sizes: Sizes) -> None:
    """Other tiles of the lightning forward sweep."""
    T, D = sizes.lengths[0], sizes.head_dim
    default = gpu.default_form(D, jnp.bfloat16, packed=False, interpreted=sizes.triton == "triton_interpreted")
    tiles = [
        (32, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 1),
        (64, 64, 8, 2),
        (64, 64, 8, 3),
        (128, 64, 8, 1),
    ]
    for chunk, width, warps, stages in tiles[: 2 if report.dry else None]:
        one = gpu.Tiles(chunk, min(width, D), warps, stages)
        for what in ("forward", "backward"):
            form = dataclasses.replace(default, **{what: one})
            name = f"lightning {what} {T}: chunk {chunk}, width {width}, {warps} warps, {stages} stages"
            with report.attempt(name):

                def out(qkv: jax.Array, form: Any = form) -> jax.Array:
                    return gpu.attend(form, qkv, _decay(sizes), None, jnp.int32(0), jnp.full((1,), T, jnp.int32), None)[
                        0
                    ]

                def gradient(qkv: jax.Array, into: jax.Array, out: Any = out) -> Any:
                    return jax.vjp(out, qkv)[1](into)[0]

                into = normal(2, (1, T, sizes.heads, D))
                args = (_qkv(sizes, 1, T),) if what == "forward" else (_qkv(sizes, 1, T), into)
                report.timed(name, seconds(out if what == "forward" else gradient, *args))
