"""Compiles every Triton and Mosaic kernel, and one period of the full-width model, for an H200, without a GPU.

    python scripts/check_kernels.py [--no-triton] [--no-model] [--only WORD]

Prints for each kernel, under the first case that launches it, registers, spills, bytes of shared memory and tensor-core
instructions (HGMMA); then the memory one period of M1 (7 lightning layers, 1 softmax) takes. Fails on a spill, on
shared memory above 232,448 bytes, on a matrix kernel without HGMMA or, Mosaic's, with serialized ones or with a warp
group that uses more registers than it keeps, and on a model that does without the kernels of an op. Mosaic's kernels
need jax 0.11; with an older one they are left out, and a line says so.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from m1jax.errors import UserError, main_guard
from m1jax.kernels.experts.cases import ExpertsCase
from m1jax.kernels.gpu import Case, aot, deviceless
from m1jax.kernels.gpu.target import missing
from m1jax.kernels.lightning_attention.cases import LightningCase
from m1jax.model import abstract
from m1jax.presets import find_config
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.stack import period

SHORT = (256, 1024)  # tokens
OPS = {"lightning_attention": "lightning", "experts": "experts", "linear": "linear", "softmax_attention": "softmax"}


def cases(word: str) -> Iterator[tuple[str, Case]]:
    """The cases with kernels of ours of all ops whose name, with that of the op before it, contains `word`."""
    for op, title in OPS.items():
        for case in importlib.import_module(f"m1jax.kernels.{op}.cases").CASES:
            if "triton" in case.forms and word in f"{title} {case.name}":
                yield f"{title} {case.name}", case


def check(name: str, case: Case, done: set[aot.Launch]) -> int:
    """Compiles a case's kernels that are not done and prints a line for each; returns how many must not be used."""
    jaxpr = jax.make_jaxpr(lambda arguments: case.call("triton", arguments))(case.abstract())
    found = list(dict.fromkeys(aot.launches(jaxpr.jaxpr)))
    if not found:
        raise UserError(f"{name}: launches no Triton kernel")
    bad = 0
    for launch in found:
        if launch in done:
            continue
        done.add(launch)
        bad += show(name, aot.compiled(launch), case.matmul)
    return bad


def show(name: str, report: aot.Report, matmul: bool) -> int:
    """Prints a line; returns 1 if the kernel must not be used."""
    faults = report.faults(matmul)
    numbers = f"{report.registers:9} {report.spills:6} {report.shared:9,} {report.hgmma:6}"
    print(f"{name:42} {report.name:16} {numbers}  {'; '.join(faults) or 'ok'}", flush=True)
    return int(bool(faults))


def sizes(case: Case) -> Iterator[Any]:
    """A case as it is, and with rows of fewer tokens: the assembler may hand out registers otherwise."""
    yield case
    if not isinstance(case, LightningCase):
        return
    yield (reduced := case.reduced())
    if reduced.ragged:
        for T in SHORT:
            yield dataclasses.replace(reduced, T=T)


def alike(case: Case) -> Case:
    """A case without what Mosaic's kernels do not depend on: of those that are then equal one is compiled."""
    case = dataclasses.replace(case, name="", must=None, whole=False)
    if isinstance(case, LightningCase):
        return dataclasses.replace(case, T=min(case.T, 8192), of=0)
    return dataclasses.replace(case, N=min(case.N, 1024)) if isinstance(case, ExpertsCase) else case


def check_mosaic(word: str, mesh: jax.sharding.Mesh) -> int:
    """The same for Mosaic's kernels, one of those that differ in the number of tokens or in decays alone."""
    if jax.__version_info__ < (0, 11):
        print(f"Mosaic's kernels need jax 0.11, this is {jax.__version__}: not compiled")
        return 0
    chosen: dict[Case, tuple[str, Case]] = {}
    for name, case in cases(word):
        for size in sizes(case):
            if "mosaic" in size.forms:
                what = name if size is case else f"{name}, {size.T} tokens"
                chosen.setdefault(alike(size), (what, size))
    with aot.mosaic_dumps() as folder:
        return sum(_check_mosaic(name, case, mesh, folder) for name, case in chosen.values())


def _check_mosaic(name: str, case: Case, mesh: jax.sharding.Mesh, folder: Path) -> int:
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), case.abstract())
    sweeps = isinstance(case, LightningCase)
    outputs = slice(1) if sweeps and not case.grad else slice(None)
    jax.jit(lambda a: jax.tree.leaves(case.call("mosaic", a))[outputs]).lower(arguments).compile()
    kind = "mosaic product" if not sweeps else "mosaic sweeps" if case.grad else "mosaic sweep"
    reports = aot.mosaic_reports(kind, folder)
    if not reports:
        raise UserError(f"{name}: Mosaic's compiler left nothing in {folder}")
    return sum(show(name, report, case.matmul) for report in reports)


def check_model(mesh: jax.sharding.Mesh, B: int, T: int, N: int) -> None:
    """Compiles one period of M1 in bfloat16 reading T tokens of B rows into a state of N, and prints its memory."""
    full = find_config("m1-80k")
    p = period(full.layer_types)
    config = dataclasses.replace(full, num_hidden_layers=p, layer_types=full.layer_types[:p])
    place = NamedSharding(mesh, PartitionSpec())

    def on_mesh(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    model = on_mesh(abstract(config))
    state = on_mesh(jax.eval_shape(lambda m: m.init_state(B, N), model))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=place)
    step = jax.jit(lambda model, tokens, state: model.step(tokens, state, logits="last"), donate_argnums=2)
    traced = step.trace(model, tokens, state)
    lowered = traced.lower()
    launched = [launch.kernel.fn.__module__ for launch in aot.launches(traced.jaxpr.jaxpr)]
    launched += ["m1jax.kernels.lightning_attention.mosaic"] * ("mosaic_gpu" in lowered.as_text())
    for op in ("lightning_attention", "experts", *(("linear", "softmax_attention") if T == 1 else ())):
        if not any(f".{op}." in module for module in launched):
            raise UserError(f"one period of M1 reading {B} x {T} tokens launches no kernel of {op}")
    memory = lowered.compile().memory_analysis()
    parts = ("argument", "output", "alias", "temp")
    sizes = ", ".join(f"{part} {getattr(memory, f'{part}_size_in_bytes') / 1e9:.2f}" for part in parts)
    calls = f"{len(launched)} calls of kernels"
    print(f"one period of M1, bfloat16, {B} x {T} tokens, {calls}; memory_analysis in GB: {sizes}")


@main_guard
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="kernels of the cases whose name contains WORD")
    parser.add_argument("--no-triton", action="store_true", help="leave out the Triton kernels")
    parser.add_argument("--no-model", action="store_true", help="leave out the model")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if not any(cases(args.only)):
        raise UserError(f"--only: no case has {args.only!r} in its name")
    if reason := missing():
        raise UserError(f"compiling Triton kernels {reason}")
    try:
        mesh = make_mesh(MeshShape(), devices=list(deviceless.mesh({"device": 1}).devices.flat))
    except ImportError as error:
        raise UserError(str(error)) from error
    with jax.set_mesh(mesh):
        print(f"{'case':42} {'kernel':16} {'registers':>9} {'spills':>6} {'shared':>9} {'hgmma':>6}")
        done: set[aot.Launch] = set()
        bad = 0 if args.no_triton else sum(check(name, case, done) for name, case in cases(args.only))
        bad += check_mosaic(args.only, mesh)
        if not args.no_model:
            check_model(mesh, B=1, T=8192, N=8192)
            check_model(mesh, B=32, T=1, N=32768)
    if bad:
        print(f"{bad} kernels must not be used", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    main()
