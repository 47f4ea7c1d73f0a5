"""A case of an op's GPU form: what `scripts/check_kernels.py` compiles. Every op lists its own in `cases.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of the op's API and the shapes to trace it with; all Triton kernels it launches are compiled.

    Attributes:
      name: op and variant, unique.
      fn: called with `args`, must reach the GPU form.
      args: abstract arrays.
      matmul: its kernels multiply matrices, so must use tensor cores.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[jax.ShapeDtypeStruct, ...]
    matmul: bool = True
