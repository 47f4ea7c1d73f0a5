"""Stage `fla`: flash-linear-attention's kernels through PyTorch, on the same mathematics.

`chunk_lightning_attn` has a decay of its own. Their tuner compiles some 200 variants one after the other, so processes
of this module (`python -m gpu_bench.fla NUMBER`) compile them beside each other first, into Triton's cache.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_bench.report import Report
from gpu_bench.timing import calls_of_a_round
from m1jax.kernels.lightning_attention.cases import CASES, LightningCase

KERNELS = ("chunk_simple_gla", "chunk_lightning_attn")
LAYER, LAYERS = 35, 80  # whose decay is used
COMPILERS = 8  # processes


def compile_variants() -> None:
    """Fills Triton's cache; what fails here fails again, and is told, where it is measured."""
    _torch()
    command = [sys.executable, "-m", "gpu_bench.fla"]
    null = subprocess.DEVNULL
    for process in [
        subprocess.Popen([*command, str(i)], stdin=null, stdout=null, stderr=null) for i in range(COMPILERS)
    ]:
        process.wait()


def _compile_some(number: int) -> None:
    """Runs every so manyth variant once, in the order of the tuner's lists."""
    from triton.runtime.autotuner import Autotuner

    _torch()
    make = Autotuner.__init__

    def some(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        mine = configs[number::COMPILERS] or configs[:1]
        make(self, fn, arg_names, mine, *args, **kwargs | {"do_bench": lambda run, quantiles: (run(), [0.0] * 3)[1]})

    Autotuner.__init__ = some
    case = LightningCase(name="", T=8192, grad=True)
    _call(KERNELS[0], case)()


def run(report: Report) -> None:
    """Times them at the shapes of lightning attention, forward first, without silu, in fla's favour."""
    for case in sorted(CASES, key=lambda case: (case.grad, case.T)):
        for name in kernels(case):
            with report.attempt(f"{name} {case.name}"):
                report.timed(f"{name} {case.name}", _seconds(_call(name, case)))
            report.write()


def kernels(case: Any) -> tuple[str, ...]:
    """Those that do what a case of lightning attention does: M1's long rows; each other shape they would tune anew."""
    return KERNELS[: 1 if case.grad else 2] if case.T > 1 and case.must else ()


def outputs(q: np.ndarray, k: np.ndarray, v: np.ndarray, log_decay: np.ndarray, into: np.ndarray) -> list[np.ndarray]:
    """fla's o, dq, dk, dv `[B, T, H, D]` of activated inputs, to be checked before its time is quoted."""
    torch = _torch()
    gamma = torch.tensor(np.asarray(log_decay), device="cuda", dtype=torch.float32)
    leaves = [torch.tensor(x, device="cuda", dtype=torch.bfloat16).requires_grad_() for x in (q, k, v)]
    out = _kernel("chunk_simple_gla", gamma)(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.tensor(into, device="cuda", dtype=torch.bfloat16))
    found = [x.detach().float().cpu().numpy() for x in (out, *gradients)]
    del leaves, out, gradients
    torch.cuda.empty_cache()
    return found


def _torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch has no CUDA device")
    return torch


def _kernel(name: str, gamma: Any) -> Callable[..., Any]:
    if name == "chunk_simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

        return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)[0]
    from fla.ops.lightning_attn import chunk_lightning_attn  # pyright: ignore[reportMissingImports]

    return lambda q, k, v: chunk_lightning_attn(q, k, v, layer_idx=LAYER, num_layers=LAYERS, scale=1.0)[0]


def _call(name: str, case: LightningCase) -> Callable[[], Any]:
    """A call to time; of a gradient without the forward pass."""
    from m1jax.kernels.lightning_attention import log_decay

    torch = _torch()
    decay = log_decay(case.H, LAYER, LAYERS).tolist()
    kernel = _kernel(name, torch.tensor(decay, device="cuda", dtype=torch.float32))
    shape = (1, case.T, case.H, case.D)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=case.grad) for _ in range(3))
    if not case.grad:

        def forward() -> Any:
            with torch.no_grad():
                return kernel(q, k, v)

        return forward
    into = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    out = kernel(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), into, retain_graph=True)


def _seconds(fn: Callable[[], Any], rounds: int = 5) -> float:
    """Median over rounds of the mean time of a call; calls of a round overlap their launches, as in `timing`."""
    torch = _torch()

    def mean(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    calls = calls_of_a_round(mean(1))
    return float(np.median([mean(calls) for _ in range(rounds)]))


if __name__ == "__main__":
    _compile_some(int(sys.argv[1]))
