"""flash-linear-attention's kernels on the same mathematics, through PyTorch, timed in the same process."""

from collections.abc import Callable
from typing import Any

import numpy as np


def chunk_simple_gla(T: int, H: int, D: int, log_decay: np.ndarray, backward: bool) -> float:
    """Seconds of `chunk_simple_gla` with M1's decay on activated bfloat16 q, k, v: without silu, in fla's favour.

    Raises:
      ImportError: torch or fla is not here, or torch has no CUDA device; says which.
    """
    torch, kernel = _import()
    gamma = torch.tensor(np.asarray(log_decay), device="cuda", dtype=torch.float32)
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))

    def forward() -> Any:
        return kernel(q, k, v, g_gamma=gamma, scale=1.0)[0]

    if not backward:
        with torch.no_grad():
            return _seconds(torch, forward)
    into = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    out = forward()
    return _seconds(torch, lambda: torch.autograd.grad(out, (q, k, v), into, retain_graph=True))


def outputs(q: np.ndarray, k: np.ndarray, v: np.ndarray, log_decay: np.ndarray, into: np.ndarray) -> list[np.ndarray]:
    """fla's o, dq, dk, dv `[B, T, H, D]` of activated inputs, to be checked before its time is quoted."""
    torch, kernel = _import()
    gamma = torch.tensor(np.asarray(log_decay), device="cuda", dtype=torch.float32)
    leaves = [torch.tensor(x, device="cuda", dtype=torch.bfloat16).requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, g_gamma=gamma, scale=1.0)[0]
    gradients = torch.autograd.grad(out, leaves, torch.tensor(into, device="cuda", dtype=torch.bfloat16))
    return [x.detach().float().cpu().numpy() for x in (out, *gradients)]


def _import() -> tuple[Any, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch has no CUDA device")
    from fla.ops.simple_gla import chunk_simple_gla as kernel  # pyright: ignore[reportMissingImports]

    return torch, kernel


def _seconds(torch: Any, fn: Callable[[], Any], rounds: int = 20) -> float:
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
