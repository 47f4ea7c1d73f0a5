"""Stage `linear`: the projections of a decode step, each of a stack of layers' matrices."""

from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench.report import Report
from gpu_bench.timing import Measurement, enough_steps, normal
from m1jax.kernels.linear import linear
from m1jax.kernels.linear.cases import CASES, LinearCase


def decode(report: Report) -> list[Measurement]:
    """Each layer's matrix in turn, beside plain XLA; the floor reads it once."""
    forms = report.implementation("triton"), "xla"
    return [_decode(report, case, how) for case in report.sized(CASES) for how in forms]


def _decode(report: Report, case: LinearCase, how: Any) -> Measurement:
    what = f"{how} {case.name}"

    def step(x: jax.Array, a: dict[str, Any]) -> jax.Array:
        outs = [linear(x, a["stack"], a["layer"] - layer, implementation=how) for layer in range(case.L)]
        # The next step must need all of this one, else equal products would be computed once.
        return x + (1e-3 * jnp.max(sum(outs), axis=1, keepdims=True)).astype(x.dtype)

    def make() -> tuple[Any, ...]:
        a = case.arguments(normal)
        return a.pop("x"), a

    floor = 2 * case.O * case.I / report.bandwidth  # of a product

    def add(time: float) -> None:
        report.timed(what, time / case.L, floor)

    return Measurement(what, step, make, add, steps=enough_steps(floor * case.L))
