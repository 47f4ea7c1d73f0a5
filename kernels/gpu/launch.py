"""Calls a Triton kernel from JAX, on the GPU or, for tests, in Triton's interpreter on the CPU."""

import functools
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from m1jax.kernels.gpu.target import capability

Grid = tuple[int, ...]


def launch(
    kernel: Any,
    *args: jax.Array | int | float,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: Grid,
    warps: int,
    stages: int,
    aliases: Mapping[int, int] | None = None,
    interpreted: bool = False,
    **constants: Any,
) -> list[jax.Array]:
    """Runs `kernel[grid](*args, *out, **constants)`.

    Args:
      kernel: a function under `triton.jit`; its parameters are those of `args`, then one per output, then constexprs.
      args: arrays (passed as pointers to row-major data, 16-byte aligned) and numbers.
      out: shape and dtype of each output; not initialised.
      grid: up to three program counts.
      warps: per program.
      stages: of software pipelining.
      aliases: which input (index into `args`, which must then start with the arrays) an output overwrites.
      interpreted: run on the CPU by Triton's interpreter.
      constants: the constexprs.

    Returns:
      The outputs.
    """
    if interpreted:
        from m1jax.kernels.gpu import interpret

        return interpret.call(kernel, args, out, grid, dict(aliases or {}), constants)
    return list(
        _jax_triton().triton_call(
            *args,
            kernel=kernel,
            out_shape=list(out),
            grid=grid,
            name=kernel.fn.__name__,
            num_warps=warps,
            num_stages=stages,
            input_output_aliases=dict(aliases or {}),
            compute_capability=capability(),
            **constants,
        )
    )


@functools.cache
def _jax_triton() -> ModuleType:
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    # The import sets it to "", which makes Triton itself write into the current folder.
    if before is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton
