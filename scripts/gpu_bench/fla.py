"""flash-linear-attention's kernels through PyTorch, on the same mathematics; `chunk_lightning_attn` with its own decay.

They are timed in a process of their own, before JAX takes the GPU's memory: as a program this module reads calls,
`[kernel, T, H, D, log decays, backward]` each, as JSON from standard input, and prints seconds of each, or why not.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

KERNELS = ("chunk_simple_gla", "chunk_lightning_attn")
LAYER, LAYERS = 35, 80  # whose decay is used

Times = dict[tuple[str, str], float | str]  # of kernel and case; or why there is none


def kernels(case: Any) -> tuple[str, ...]:
    """Those that do what a case of lightning attention does: long rows of M1's kind."""
    plain = case.B == 1 and case.T > 1 and case.D == 128 and case.dtype == "bfloat16" and not case.packed
    return KERNELS[: 1 if case.grad else 2] if plain else ()


def measure(cases: Iterable[Any]) -> Times:
    """Seconds of the kernels for cases of lightning attention, without silu, in fla's favour."""
    from m1jax.kernels.lightning_attention import log_decay

    calls = {
        (name, case.name): (name, case.T, case.H, case.D, log_decay(case.H, LAYER, LAYERS).tolist(), case.grad)
        for case in cases
        for name in kernels(case)
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpu_bench.fla"], input=json.dumps(list(calls.values())), capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        return dict.fromkeys(calls, f"RuntimeError: {done.stderr[-200:]}")
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))


def of(times: Times, kernel: str, case: Any) -> float:
    """The seconds of one call.

    Raises:
      ImportError: torch or fla is not here, or torch has no CUDA device; says which.
      RuntimeError: the kernel failed; says how.
    """
    found = times.get((kernel, case.name), "ImportError: not timed in a dry run")
    if isinstance(found, str):
        kind, _, text = found.partition(": ")
        raise ImportError(text) if kind in ("ImportError", "ModuleNotFoundError") else RuntimeError(found)
    return found


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


def _time(name: str, T: int, H: int, D: int, log_decay: list[float], backward: bool) -> float:
    torch = _torch()
    kernel = _kernel(name, torch.tensor(log_decay, device="cuda", dtype=torch.float32))
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))
    if not backward:
        with torch.no_grad():
            return _median(torch, lambda: kernel(q, k, v))
    into = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    out = kernel(q, k, v)
    return _median(torch, lambda: torch.autograd.grad(out, (q, k, v), into, retain_graph=True))


def _median(torch: Any, fn: Callable[[], Any], rounds: int = 20) -> float:
    for _ in range(3):
        fn()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return float(np.median(times))


def main() -> None:
    """The program."""
    found: list[float | str] = []
    for call in json.load(sys.stdin):
        try:
            found.append(_time(*call))
        except Exception as error:  # one that does not fit the memory must not cost the others
            found.append(f"{type(error).__name__}: {error}")
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
