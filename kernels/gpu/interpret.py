"""Runs Triton kernels on the CPU in Triton's interpreter, on NumPy arrays. Slow, but the kernel's own text: for tests.

The interpreter must be chosen before triton is imported (TRITON_INTERPRET=1), and then nothing can be compiled.
"""

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from triton import knobs
from triton.runtime import interpreter

if not knobs.runtime.interpret:
    raise ImportError("triton was imported for compilation: set TRITON_INTERPRET=1 before it is")

_NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int32": "i32",
    "int64": "i64",
    "int8": "i8",
    "uint8": "u8",
    "uint32": "u32",
    "bool": "i1",
}


class _Tensor:
    """A NumPy array as the interpreter wants its arguments: what it asks of a torch tensor, without copies."""

    def __init__(self, array: np.ndarray):
        assert array.flags.c_contiguous
        self.array = array
        self.dtype = _NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return self

    def set_(self, *_: Any) -> "_Tensor":
        return self

    def copy_(self, *_: Any) -> "_Tensor":
        return self


def _wide(handle: Any) -> np.ndarray:
    """Values of an interpreter tensor; it keeps bfloat16 as bare 16-bit integers."""
    if handle.dtype.scalar == triton.language.bfloat16:
        return handle.data.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return handle.data


_patch = interpreter._patch_lang
_patched: set[str] = set()


def _patch_once(fn: Any) -> Any:
    """Triton's language becomes the interpreter's for good: Triton's own does it anew whenever a kernel calls another.

    That took a sixth of the time.
    """
    if fn.__module__ not in _patched:
        _patch(fn)
        _patched.add(fn.__module__)
    return interpreter._LangPatchScope()  # nothing to put back


interpreter._patch_lang = _patch_once
# Whether integers overflow is worked out with several operations for each of theirs, and told only with `debug`.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

_dot = interpreter.interpreter_builder.create_dot


def _exact_dot(a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """`tl.dot`: Triton's own multiplies the bit patterns of bfloat16 as integers."""
    if triton.language.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(_wide(a), _wide(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_trunc = interpreter.interpreter_builder.create_fp_trunc


def _rounded(src: Any, dst_type: Any) -> Any:
    """float32 to bfloat16, to nearest as GPUs do: Triton's own cuts off."""
    if src.dtype.scalar == triton.language.float32 and dst_type.scalar == triton.language.bfloat16:
        return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), dst_type.scalar)
    return _trunc(src, dst_type)


_from_integers = interpreter.interpreter_builder.create_si_to_fp


def _converted(source: Any, kind: Any) -> Any:
    """Integers to bfloat16: Triton's own takes the integer for the bit pattern."""
    if kind.scalar == triton.language.bfloat16:
        return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), kind.scalar)
    return _from_integers(source, kind)


_one_at_a_time = threading.Lock()  # the interpreter keeps what runs in globals, and XLA calls the host from any thread
_memory: list[tuple[int, int]] = []  # arrays of the running kernel: first address, first behind


def _require_inside(pointers: Any, mask: Any) -> None:
    used = pointers.data[mask.data]
    if used.size and not any(first <= used.min() and used.max() < end for first, end in _memory):
        raise IndexError("a kernel reads or writes outside its arrays")


_builder: Any = interpreter.interpreter_builder
_load, _store = _builder.create_masked_load, _builder.create_masked_store


def _load_inside(pointers: Any, mask: Any, *rest: Any) -> Any:
    _require_inside(pointers, mask)
    return _load(pointers, mask, *rest)


def _store_inside(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _require_inside(pointers, mask)
    return _store(pointers, value, mask, *rest)


_builder.create_masked_load = _load_inside
_builder.create_masked_store = _store_inside
_builder.create_dot = _exact_dot
_builder.create_si_to_fp = _converted
_builder.create_ui_to_fp = _converted
_builder.create_fp_trunc = _rounded


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on NumPy arrays, which it changes in place.

    Raises:
      IndexError: it reads or writes outside them.
    """
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    wrapped = [_Tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    with _one_at_a_time, np.errstate(over="ignore", under="ignore"):
        _memory[:] = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]
        kernel[grid](*wrapped, **constants)


def call(
    kernel: Any,
    args: Sequence[Any],
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: dict[int, int],
    constants: dict[str, Any],
) -> list[jax.Array]:
    """As `launch`, from inside a traced program."""
    places = [i for i, a in enumerate(args) if not isinstance(a, bool | int | float)]

    def on_host(*arrays: Any) -> list[np.ndarray]:
        filled = list(args)
        for i, a in zip(places, arrays, strict=True):
            filled[i] = np.array(a, order="C")
        # What a kernel forgets to write shows as NaN.
        results = [np.full(o.shape, np.nan if jax.numpy.issubdtype(o.dtype, np.floating) else -1, o.dtype) for o in out]
        for source, target in aliases.items():
            results[target] = filled[source]
        run(kernel, grid, *filled, *results, **constants)
        return results

    return list(jax.pure_callback(on_host, list(out), *(args[i] for i in places)))
