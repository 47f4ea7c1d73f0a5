"""Stages of the two attentions: lightning forward, backward and decode, softmax prefill, gradient and decode."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench import fla
from gpu_bench.report import Report
from gpu_bench.timing import normal, seconds, seconds_chained
from m1jax.kernels.lightning_attention import cases, gpu, lightning_attention
from m1jax.kernels.lightning_attention.cases import LightningCase
from m1jax.kernels.softmax_attention import cases as softmax_cases
from m1jax.kernels.softmax_attention import softmax_attention
from m1jax.kernels.softmax_attention.cases import SoftmaxCase

Arguments = dict[str, Any]


def stage_of(case: LightningCase) -> str:
    """Which stage times it."""
    return "decode" if case.T == 1 else "backward" if case.grad else "forward"


def lightning(report: Report, baseline: fla.Times) -> None:
    """Lightning attention beside plain XLA and, where it is the same call, fla.

    A gradient is timed without the forward pass, a decode step for each layer whose state it updates in place.
    """
    ours = report.implementation("triton")
    for case in report.sized(case for case in cases.CASES if stage_of(case) == report.stage):
        times: dict[str, float] = {}
        for name in (ours, "xla"):
            with report.attempt(f"{name} {case.name}", case.must if name == ours else None):
                times[name] = _seconds(case, name)
        for kernel in fla.kernels(case):
            with report.attempt(f"fla {kernel} {case.name}"):
                times[f"fla {kernel}"] = fla.of(baseline, kernel, case)
        for name, time in times.items():
            ratio = {"ours_is_faster": time / times[ours]} if ours in times and name != ours else {}
            floor = _bytes(case) / report.bandwidth
            report.timed(f"{name} {case.name}", time, floor, case.must if name == ours else None, **ratio)


def _bytes(case: LightningCase) -> float:
    """The least that is read and written: the state by a step, else q, k, v, o, of which a gradient sweeps twice."""
    if case.T == 1:
        return 2 * 4 * case.B * case.H * case.D**2
    arrays = 10 if case.grad else 4
    return arrays * case.B * case.T * case.H * case.D * jnp.dtype(case.dtype).itemsize


def _seconds(case: LightningCase, name: Any) -> float:
    arguments = case.arguments(normal)
    if case.T > 1:
        # A layer needs o alone: the compiler leaves out the rest, as it does the forward pass of a gradient.
        return seconds(lambda a: case.call(name, a) if case.grad else case.call(name, a)[0], arguments)
    states, qkv, decay = (arguments.pop(key) for key in ("state", "qkv", "log_decay"))
    del arguments

    def step(carry: Any, qkv: jax.Array, decay: jax.Array) -> Any:
        states, out = carry
        for layer in range(case.layers):
            out, states = lightning_attention(qkv, decay, state=states, layer=layer, implementation=name)
        return states, out

    carry = states, jnp.zeros((case.B, 1, case.H, case.D), case.dtype)
    return seconds_chained(step, carry, qkv, decay, steps=8) / case.layers


def softmax(report: Report) -> None:
    """Causal attention of one row, forward and with gradients; then one token into a cache."""
    for case in report.sized(softmax_cases.CASES):
        arguments = case.arguments(normal)
        names = [case.library, "cudnn"] if case.T == 1 else [case.library]
        for name in dict.fromkeys([*map(report.implementation, names), "xla"]):
            with report.attempt(f"{name} {case.name}"):
                if case.T == 1:
                    time = seconds_chained(_decode(case, name), arguments["q"].copy(), arguments, steps=16)
                    floor = 4 * case.B * case.K * case.N * case.D / report.bandwidth
                    report.timed(f"{name} {case.name}", time, floor)
                else:
                    time = seconds(lambda a, case=case, name=name: case.call(name, a), arguments)
                    flop = case.flop * (3.5 if case.grad else 1)
                    report.timed(f"{name} {case.name}", time, TFLOPs=flop / time / 1e12)


def _decode(case: SoftmaxCase, name: Any) -> Any:
    def step(q: jax.Array, arguments: Arguments) -> jax.Array:
        last = jnp.full((case.B,), case.N - 1)
        return softmax_attention(q, arguments["k"], arguments["v"], offset=last, implementation=name)

    return step


def sweep(report: Report) -> None:
    """Other tiles of the lightning sweeps."""
    tiles = [(32, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3),
             (128, 64, 8, 1)]  # fmt: skip
    found = report.sized(case for case in cases.CASES if case.name in ("forward 8192", "backward without a state"))
    for choice, case in itertools.product(tiles[: 2 if report.dry else None], found):
        chunk, width, warps, stages = choice
        name = f"lightning {case.name}: chunk {chunk}, width {width}, {warps} warps, {stages} stages"
        form = gpu.default_form(case.D, jnp.bfloat16, packed=False, interpreted=report.dry)
        form = dataclasses.replace(form, **{stage_of(case): gpu.Tiles(chunk, width, warps, stages)})

        def run(a: Arguments, form: Any = form, case: LightningCase = case) -> Any:
            def out(qkv: jax.Array) -> jax.Array:
                return gpu.attend(form, qkv, a["log_decay"], None, 0, jnp.full((case.B,), case.T, jnp.int32), None)[0]

            return jax.vjp(out, a["qkv"])[1](a["d_out"]) if case.grad else out(a["qkv"])

        with report.attempt(name):
            report.timed(name, seconds(run, case.arguments(normal)))
