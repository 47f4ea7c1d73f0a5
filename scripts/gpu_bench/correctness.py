"""Stage `check`: every kernel against the reference on this device, at shapes that no tile divides."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_bench import fla
from gpu_bench.report import Report
from gpu_bench.timing import normal
from gpu_bench.turns import wait
from m1jax.kernels.experts import cases as experts
from m1jax.kernels.gpu.case import Case, reduced
from m1jax.kernels.lightning_attention import cases as lightning
from m1jax.kernels.lightning_attention import log_decay
from m1jax.kernels.linear import cases as linear
from m1jax.kernels.softmax_attention import cases as softmax

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2}  # relative RMS, gradients included


def comparisons(report: Report) -> Iterator[tuple[str, str, Case]]:
    """(op, implementation on a GPU, case): all cases reduced, in both dtypes, and some as they are."""
    ops = {"lightning": lightning.CASES, "linear": linear.CASES, "experts": experts.CASES, "softmax": softmax.CASES}
    for op, cases in ops.items():
        both = [dataclasses.replace(case, dtype=dtype) for case in cases for dtype in TOLERANCE]
        chosen = report.sized(cases) if report.dry else [*reduced(both), *(case for case in cases if case.whole)]
        for case in chosen:
            for name in case.forms:
                if name != "cudnn" or case.dtype != "float32":  # which cuDNN does not take
                    yield op, name, case


def check(report: Report, mine: Any) -> None:
    """Adds a row for each comparison that `mine` picks; `wrong` is whether it failed."""
    compiled = []
    for op, name, case in mine(comparisons(report)):
        what = f"{op} {case.name}" + " whole" * case.whole + f", {name}" * (name == "mosaic")
        with report.attempt(f"{what} {case.dtype}"):
            forms = [_compiled(case, how) for how in (report.implementation(name), "reference")]
            made = jax.jit(lambda case=case: case.arguments(normal)).lower().compile()
            compiled.append((what, case, made, forms))
    wait()
    for what, case, made, forms in compiled:
        with report.attempt(f"{what} {case.dtype}"):
            arguments = made()
            _compare(report, what, case.dtype, *(form(arguments) for form in forms))


def _compiled(case: Case, how: Any) -> Any:
    run = jax.jit(lambda arguments: case.defined(arguments, case.call(how, arguments)))
    return run.lower(case.abstract()).compile()


def _compare(report: Report, what: str, dtype: str, got: Any, want: Any) -> None:
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        errors.append(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))))
    worst = float(np.max(errors))  # NaN if one is
    report.add(what, dtype=dtype, error=worst, wrong=not worst < TOLERANCE[dtype])


def check_fla(report: Report) -> None:
    """fla's outputs and gradients: a baseline that computes something else is none."""
    T, H, D = 300, 64, 128  # what was compiled for the timings depends on H
    decay = log_decay(H, 35, 80)
    qkv, into = normal(1, (1, T, H, 3, D)), normal(3, (1, T, H, D))
    active = jax.nn.silu(qkv.astype(jnp.float32))
    position = jnp.arange(T)
    lag = position[:, None] - position
    mask = jnp.where(lag >= 0, jnp.exp(decay[:, None, None] * jnp.maximum(lag, 0)), 0.0)  # [H, T, T]

    def out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * mask
        return jnp.einsum("bhts,bshd->bthd", scores, v, precision="highest")

    parts = [active[:, :, :, i] for i in range(3)]
    y, vjp = jax.vjp(out, *parts)
    want = [y, *vjp(into.astype(jnp.float32))]
    q, k, v = (np.asarray(x) for x in parts)
    got = fla.outputs(q, k, v, decay, np.asarray(into, np.float32))
    _compare(report, "fla chunk_simple_gla and gradients", "bfloat16", got, want)
