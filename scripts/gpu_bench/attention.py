"""Stages of the two attentions: lightning forward, backward and decode, softmax prefill, gradient and decode."""

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench.report import Report
from gpu_bench.timing import Measurement, enough_steps, normal
from m1jax.kernels.lightning_attention import cases, gpu, lightning_attention
from m1jax.kernels.lightning_attention.cases import LightningCase
from m1jax.kernels.softmax_attention import cases as softmax_cases
from m1jax.kernels.softmax_attention import softmax_attention
from m1jax.kernels.softmax_attention.cases import SoftmaxCase

Arguments = dict[str, Any]

LONG = 131_072  # tokens; longer rows have the device to themselves
PLAIN_FLOP = 2e13  # softmax attention of more takes plain XLA seconds


def stage_of(case: LightningCase) -> str:
    """Which stage times it."""
    stage = "decode" if case.T == 1 else "backward" if case.grad else "forward"
    return f"{stage}-long" if case.T > LONG else stage


def lightning(report: Report) -> list[Measurement]:
    """Lightning attention beside plain XLA.

    A gradient is timed without the forward pass, a decode step for each layer whose state it updates in place.
    """
    chosen = report.sized(case for case in cases.CASES if stage_of(case) == report.stage)
    return [m for case in chosen for m in _lightning(report, case)]


def _lightning(report: Report, case: LightningCase) -> list[Measurement]:
    ours = report.implementation(case.forms[0])

    def measurement(name: Any) -> Measurement:
        what, must = f"{name} {case.name}", case.must if name == ours else None
        floor = _bytes(case) / report.bandwidth
        return _measurement(report, case, name, lambda time: report.timed(what, time, floor, must), must)

    return [measurement(name) for name in (ours, "xla")[: 2 if case.T <= LONG else 1]]


def _bytes(case: LightningCase) -> float:
    """The least that is read and written: the state by a step, else q, k, v, o, of which a gradient sweeps twice.

    Of padding nothing need be read.
    """
    if case.T == 1:
        return 2 * 4 * case.B * case.H * case.D**2
    read, written = (7, 3) if case.grad else (3, 1)  # forward k, v, d_o for d_q; backward all four for d_k and d_v
    tokens = case.valid * read + case.B * case.T * written
    return tokens * case.H * case.D * jnp.dtype(case.dtype).itemsize


def _measurement(report: Report, case: LightningCase, name: Any, add: Any, must: float | None = None) -> Measurement:
    def whole(a: Arguments) -> Any:
        # A layer needs o alone: the compiler leaves out the rest, as it does the forward pass of a gradient.
        return case.call(name, a) if case.grad else case.call(name, a)[0]

    def step(carry: Any, qkv: jax.Array, decay: jax.Array) -> Any:
        states, outs = carry[0], []
        for layer in range(case.layers):
            out, states = lightning_attention(qkv, decay, state=states, layer=layer, implementation=name)
            outs.append(out)  # an o that nobody wants would not be computed by XLA
        return states, outs

    def to_step() -> tuple[Any, ...]:
        a = case.arguments(normal)
        outs = [jnp.zeros((case.B, 1, case.H, case.D), case.dtype) for _ in range(case.layers)]
        return (a["state"], outs), a["qkv"], a["log_decay"]

    what = f"{name} {case.name}"
    if case.T > 1:
        return Measurement(what, whole, lambda: (case.arguments(normal),), add, must)
    floor = _bytes(case) / report.bandwidth
    return Measurement(
        what, step, to_step, lambda time: add(time / case.layers), must, enough_steps(floor * case.layers),
        lambda time: report.timed(f"{what}, on the device", time / case.layers, floor),
    )  # fmt: skip


def softmax(report: Report) -> list[Measurement]:
    """Causal attention of one row, forward and with gradients; then a few tokens into a cache."""
    found = []
    for case in report.sized(softmax_cases.CASES):
        ours = dict.fromkeys(map(report.implementation, (*case.forms, "cudnn")))
        found += [_softmax(report, case, name) for name in ours]
        if case.flop < PLAIN_FLOP and "xla" not in ours:
            found.append(_softmax(report, case, "xla"))
        if case.T == 1:
            found.append(_softmax(report, case, "jax's gqa of one layer"))
    return found


def _softmax(report: Report, case: SoftmaxCase, name: Any) -> Measurement:
    what = f"{name} {case.name}"

    def step(q: jax.Array, a: Arguments) -> jax.Array:
        offset = jnp.full((case.B,), case.N - case.T)
        if name.startswith("jax's"):
            return _gqa(q, a["k"][0], a["v"][0], offset, interpreted=report.dry)
        return softmax_attention(q, a["k"], a["v"], offset=offset, layer=a["layer"], implementation=name)

    def to_step() -> tuple[Any, ...]:
        a = case.arguments(normal)
        if name.startswith("jax's"):  # spared the copy out of the stack
            a |= {"k": a["k"][:1], "v": a["v"][:1]}
        return a.pop("q"), a

    def add(time: float) -> None:
        flop = case.flop * (3.5 if case.grad else 1)
        report.timed(what, time, TFLOPs=flop / time / 1e12)

    floor = 2 * case.B * case.K * case.N * case.D * jnp.dtype(case.dtype).itemsize / report.bandwidth  # of a step

    if case.layers is None:
        return Measurement(what, lambda a: case.call(name, a), lambda: (case.arguments(normal),), add)
    return Measurement(what, step, to_step, lambda time: report.timed(what, time, floor), steps=enough_steps(floor))


def _gqa(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, interpreted: bool) -> jax.Array:
    """The kernel for a decode step that jax has, deprecated since 0.12: q `[B, 1, H, D]`, k and v `[B, K, N, D]`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.decode_attention import gqa

        splits = 16
        block = math.gcd(128, k.shape[2] // splits)
        out: Any = gqa(
            q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), kv_seq_len=offset + 1, k_splits=splits, block_k=block,
            interpret=interpreted,
        )  # fmt: skip
    return out[:, None].astype(v.dtype)


def sweep(report: Report) -> list[Measurement]:
    """Other tiles of the lightning sweeps."""
    tiles = [(64, 64, 8, 1), (64, 64, 16, 1), (32, 64, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (128, 64, 8, 1)]
    chosen = report.sized(case for case in cases.CASES if case.name in ("forward 8192", "backward without a state"))
    return [
        _tiled(report, case, gpu.Tiles(*choice)) for case in chosen for choice in tiles[: 2 if report.dry else None]
    ]


def _tiled(report: Report, case: LightningCase, tiles: gpu.Tiles) -> Measurement:
    stage = "backward" if case.grad else "forward"
    form = gpu.default_form(case.D, jnp.bfloat16, packed=False, interpreted=report.dry)
    form = dataclasses.replace(form, **{stage: tiles})

    def run(a: Arguments) -> Any:
        def out(qkv: jax.Array) -> jax.Array:
            return gpu.attend(form, qkv, a["log_decay"], None, 0, jnp.full((case.B,), case.T, jnp.int32), None)[0]

        return jax.vjp(out, a["qkv"])[1](a["d_out"]) if case.grad else out(a["qkv"])

    what = f"lightning {case.name}: chunk {tiles.chunk}, width {tiles.width}, {tiles.warps} warps"
    return Measurement(what, run, lambda: (case.arguments(normal),), lambda time: report.timed(what, time))
