"""Stages of the experts: the grouped product of a prefill, forward and with gradients, decode, and other tiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench.report import PEAKS, Report
from gpu_bench.timing import normal, seconds, seconds_chained
from m1jax.kernels.experts import experts, gpu
from m1jax.kernels.experts.cases import CASES, ExpertsCase

DECODED = 160  # tokens up to which a case is a decode step
MUST_TIMES_FLOOR = 1.3  # decode: of the time to read the weights of the chosen experts

Arguments = dict[str, Any]


def prefill(report: Report) -> None:
    """Products per second; a gradient is of x, weights and shares, or with quantised weights of x and shares."""
    ours = report.implementation("triton")
    for case in report.sized(case for case in CASES if case.N > DECODED):
        arguments, times = case.arguments(normal), {}
        for how in (ours,) if case.grad else (ours, "xla"):
            must = case.must if how == ours else None
            with report.attempt(f"{how} {case.name}", must):
                times[how] = seconds(lambda a, how=how, case=case: case.call(how, a), arguments)
                flop = case.flop * ((2 if case.kind else 3) if case.grad else 1)
                more = _rates(flop, times[how])
                if how != ours and ours in times:
                    more["ours_is_faster"] = times[how] / times[ours]
                report.timed(f"{how} {case.name}", times[how], None, must, **more)


def _rates(flop: float, time: float) -> dict[str, float]:
    return {"TFLOPs": flop / time / 1e12} | {f"share of {k} peak": flop / time / peak for k, peak in PEAKS.items()}


def decode(report: Report) -> None:
    """One token for each row; the floor reads each chosen expert once."""
    ours = report.implementation("triton")
    for case in report.sized(case for case in CASES if case.N <= DECODED):
        arguments = case.arguments(normal)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves((arguments["gate_up"], arguments["down"])))
        chosen = set(jax.device_get(arguments["chosen"]).reshape(-1).tolist()) - {case.E}
        floor = len(chosen) * stored / (case.layers * case.E) / report.bandwidth
        for how in (ours, "xla"):
            must = MUST_TIMES_FLOOR * floor if how == ours else None
            with report.attempt(f"{how} {case.name}", must):
                report.timed(f"{how} {case.name}", _step_seconds(case, arguments, how), floor, must)


def _step_seconds(case: ExpertsCase, arguments: Arguments, how: Any) -> float:
    def step(x: jax.Array, rest: Arguments) -> jax.Array:
        return experts(x, **rest, implementation=how).astype(x.dtype)

    rest = dict(arguments)
    x = rest.pop("x").copy()  # it is given away
    return seconds_chained(step, x, rest, steps=32)


def sweep(report: Report) -> None:
    """Other tiles, for both products at once: (rows, out, inner, warps, stages, split)."""
    wide = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (64, 128, 64, 8, 3), (64, 128, 64, 4, 4),
            (128, 64, 64, 4, 4), (128, 64, 64, 8, 4)]  # fmt: skip
    narrow = [(16, 64, 64, 4, 4), (16, 64, 128, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 4), (16, 128, 128, 8, 3),
              (16, 64, 64, 4, 4, 2), (16, 64, 128, 4, 4, 2), (16, 64, 128, 4, 3, 4)]  # fmt: skip
    for case in report.sized(CASES):
        if case.grad or case.dtype != "bfloat16" or case.N not in ((1, 200) if report.dry else (1, 128, 8192)):
            continue
        arguments = case.arguments(normal)
        for choice in (narrow if case.N <= DECODED else wide)[: 1 if report.dry else None]:
            down = gpu.Tiles(*choice)
            default = gpu.default_form(case.N * case.k, case.E, jnp.bfloat16, 0, report.dry)
            form = dataclasses.replace(default, gate_up=dataclasses.replace(down, split=1), down=down)
            with report.attempt(f"experts {case.name}: tiles {choice}"):
                run = functools.partial(gpu.experts, form=form)
                report.timed(f"experts {case.name}: tiles {choice}", seconds(lambda a, run=run: run(**a), arguments))
