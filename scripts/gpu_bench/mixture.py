"""Stages of the experts: the grouped product of a prefill, forward and with gradients, decode, and other tiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gpu_bench.report import PEAKS, Report
from gpu_bench.timing import Measurement, enough_steps, normal
from m1jax.kernels.experts import experts, gpu
from m1jax.kernels.experts.cases import CASES, ExpertsCase
from m1jax.kernels.experts.quantized import Quantized

DECODED = 160  # tokens up to which a case is a decode step
MUST_TIMES_FLOOR = 1.3  # decode: of the time to read the weights of the chosen experts

# Weights stored otherwise than is common are only compiled and checked.
TIMED = [case for case in CASES if case.down == "alike" and not (case.kind and case.dtype == "float32")]

Arguments = dict[str, Any]


def prefill(report: Report) -> list[Measurement]:
    """Products per second; a gradient is of x, weights and shares, or with quantised weights of x and shares."""
    chosen = report.sized(case for case in TIMED if case.N > DECODED)
    peers = [] if report.dry else [_tokamax(report, case) for case in chosen if case.must]
    return [m for case in chosen for m in _prefill(report, case)] + peers


def _prefill(report: Report, case: ExpertsCase) -> list[Measurement]:
    ours = [report.implementation(name) for name in case.forms]
    flop = case.flop * ((2 if case.kind else 3) if case.grad else 1)

    def measurement(how: Any) -> Measurement:
        what, must = f"{how} {case.name}", case.must if how in ours else None

        def add(time: float) -> None:
            report.timed(what, time, None, must, **_rates(flop, time))

        return Measurement(what, lambda a: case.call(how, a), lambda: (case.arguments(normal),), add, must)

    return [measurement(how) for how in (ours if case.grad else [*ours, "xla"])]


def _tokamax(report: Report, case: ExpertsCase) -> Measurement:
    """The products by tokamax's Mosaic kernel and silu between them, for rows in order and weights as it wants them.

    Its tiles are those that it brings for an H100 and many rows (`data/autotuning`): it has none for an H200, and
    chooses others there that are meant for few.
    """
    what = f"tokamax {case.name}, rows in order, not summed"

    def products(rows: jax.Array, gate_up: jax.Array, down: jax.Array, counts: jax.Array) -> jax.Array:
        from tokamax import ragged_dot  # pyright: ignore[reportMissingImports]
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as form  # pyright: ignore[reportMissingImports]

        tiles = {"block_m": 128, "block_n": 64, "block_k": 128, "num_stages": 4, "split_k": 1}
        config = form.Config(**tiles, persistent=True, grid_tile_width=8)
        how = form.PallasMosaicGpuRaggedDot(config=config)
        dot = functools.partial(ragged_dot, group_sizes=counts, implementation=[how])
        gate, up = jnp.split(dot(rows, gate_up), 2, axis=1)
        return dot(jax.nn.silu(gate) * up, down)

    def make() -> tuple[Any, ...]:
        shapes = (case.N * case.k, case.M), (case.E, case.M, 2 * case.F), (case.E, case.F, case.M)
        counts = jnp.bincount(case.drawn().reshape(-1), length=case.E).astype(jnp.int32)
        return *(normal(i, shape, case.dtype) for i, shape in enumerate(shapes)), counts

    return Measurement(what, products, make, lambda time: report.timed(what, time, **_rates(case.flop, time)))


def _rates(flop: float, time: float) -> dict[str, float]:
    return {"TFLOPs": flop / time / 1e12} | {f"share of {k} peak": flop / time / peak for k, peak in PEAKS.items()}


def decode(report: Report) -> list[Measurement]:
    """One token for each row; the floor reads each chosen expert once."""
    chosen = report.sized(case for case in TIMED if case.N <= DECODED)
    return [_decode(report, case, how) for case in chosen for how in (report.implementation("triton"), "xla")]


def _decode(report: Report, case: ExpertsCase, how: Any) -> Measurement:
    what, abstract = f"{how} {case.name}", case.abstract()
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((abstract["gate_up"], abstract["down"])))
    drawn = set(jax.device_get(case.drawn()).reshape(-1).tolist()) - {case.E}
    floor = len(drawn) * stored / (case.layers * case.E) / report.bandwidth
    must = MUST_TIMES_FLOOR * floor if how != "xla" else None

    def step(x: jax.Array, rest: Arguments) -> jax.Array:
        return experts(x, **rest, implementation=how).astype(x.dtype)

    def make() -> tuple[Any, ...]:
        a = case.arguments(normal)
        return a.pop("x"), a

    def add_busy(time: float) -> None:
        report.timed(f"{what}, on the device", time, floor)

    return Measurement(
        what, step, make, lambda time: report.timed(what, time, floor, must), must, enough_steps(floor),
        None if how == "xla" else add_busy,
    )  # fmt: skip


def sweep(report: Report) -> list[Measurement]:
    """Other tiles, for one product at a time: (rows, out, inner, warps, stages, split)."""
    gate_up = [(128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (256, 64, 64, 8, 3)]
    down = [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    narrow = [(16, 64, 128, 4, 4), (16, 128, 128, 4, 3), (16, 128, 128, 8, 3), (16, 32, 128, 4, 4), (16, 64, 128, 4, 3)]
    few = [(16, 64, 128, 4, 3), (16, 64, 128, 4, 4), (16, 64, 128, 4, 6), (16, 128, 128, 4, 4), (16, 128, 128, 8, 4)]
    found = []
    for case in report.sized(TIMED):
        if case.grad or case.dtype != "bfloat16" or case.N not in ((1, 200) if report.dry else (1, 32, 8192)):
            continue
        for gated, choices in ((True, gate_up), (False, down)):
            form = _few if case.kind == "int4" and case.N <= DECODED else _tiled
            if case.N <= DECODED:
                tiles = few if form is _few else narrow
                choices = tiles if gated else [(*one, split) for one in tiles for split in (1, 2, 4)]
            found += [form(report, case, gated, choice) for choice in choices[: 1 if report.dry else None]]
        if "mosaic" in case.forms:
            shared: list[Any] = ["x"] if report.dry else ["x", "weights", None]
            found += [_planned(report, case, gated, what) for gated in (True, False) for what in shared]
    return found


def _planned(report: Report, case: ExpertsCase, gated: bool, shared: Any) -> Measurement:
    """A product by Mosaic, with what pairs of programs load together; rows are in their order, and stay so."""
    from m1jax.kernels.experts import mosaic

    plan = mosaic.Plan(shared, programs=4) if report.dry else mosaic.Plan(shared)

    def product(rows: jax.Array, weights: jax.Array, layer: jax.Array, chosen: jax.Array) -> jax.Array:
        tiles = mosaic.layout(chosen, case.E, plan.blocks).tiles
        return mosaic.product(plan, gated, rows, weights, layer, tiles, report.dry)

    def make() -> tuple[Any, ...]:
        a = case.arguments(normal)
        R = mosaic.rows_of(case.N * case.k, case.E)
        rows = normal(7, (R, case.M if gated else case.F), case.dtype)
        return rows, a["gate_up" if gated else "down"], jnp.asarray([case.layers - 1]), a["chosen"]

    what = f"{case.name}, {'gate_up' if gated else 'down'}: mosaic, shared {shared}"
    return _product(report, case, gated, what, product, make)


def _product(report: Report, case: ExpertsCase, gated: bool, what: str, product: Any, make: Any) -> Measurement:
    def add(time: float) -> None:
        flop = case.flop * (2 if gated else 1) / 3
        report.timed(what, time, TFLOPs=flop / time / 1e12)

    return Measurement(what, product, make, add)


def _tiled(report: Report, case: ExpertsCase, gated: bool, choice: tuple[int, ...]) -> Measurement:
    form = gpu.default_form(case.N * case.k, case.E, jnp.bfloat16, (0, 0), report.dry)
    form = dataclasses.replace(form, **{"gate_up" if gated else "down": gpu.Tiles(*choice)})
    product = functools.partial(gpu.product, form, gated, case.k)
    what = f"{case.name}, {'gate_up' if gated else 'down'}: tiles {choice}"

    def make() -> tuple[Any, ...]:
        a = case.arguments(normal)
        x = a["x"] if gated else normal(7, (case.N * case.k, case.F), case.dtype)
        return x, a["gate_up" if gated else "down"], jnp.asarray([case.layers - 1]), a["chosen"]

    return _product(report, case, gated, what, product, make)


def _few(report: Report, case: ExpertsCase, gated: bool, choice: tuple[int, ...]) -> Measurement:
    """As `_tiled`, the product of few rows with int4 weights; rows are in their order, and stay so."""
    from m1jax.kernels.experts import int4

    what = f"{case.name}, {'gate_up' if gated else 'down'}: int4 tiles {choice}"

    def product(rows: int4.Arranged, weights: Quantized, layer: jax.Array, chosen: jax.Array) -> jax.Array:
        tiles = dataclasses.replace(gpu.Tiles(*choice), inner=weights.group)
        then = weights if gated else None  # of whose groups only the size counts
        return int4.product(tiles, rows, weights, layer, chosen, report.dry, then)[0]

    def make() -> tuple[Any, ...]:
        a = case.arguments(normal)
        weights = a["gate_up" if gated else "down"]
        x = a["x"] if gated else normal(7, (case.N * case.k, case.F), case.dtype)
        return int4.arranged(x, weights.group), weights, jnp.asarray([case.layers - 1]), a["chosen"]

    return _product(report, case, gated, what, product, make)
