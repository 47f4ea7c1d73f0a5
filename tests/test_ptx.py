"""The pieces of PTX that convert integers, which no interpreter of Triton runs, evaluated as the PTX manual says."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

from m1jax.kernels.experts import int4, kernels, single


def evaluate(text: str, inputs: list[int], outputs: int) -> list[int]:
    """The registers `$0` on after a piece of PTX, whose inputs are the registers after them."""
    registers: dict[str, int] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> int:
        if operand in registers:
            return registers[operand]
        return int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)

    for line in re.findall(r"^([^.{}][^;]*);", text, re.M):
        name, _, rest = line.strip().partition(" ")
        if rest.startswith("{"):  # a register into two halves
            halves, source = re.fullmatch(r"\{(.*)\}, (\S+)", rest).groups()  # pyright: ignore[reportOptionalMemberAccess]
            low, high = halves.split(", ")
            registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        target, *operands = rest.split(", ")
        registers[target] = OPERATIONS[name](*map(value, operands)) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes of the eight of a and b."""
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes(bytes(both[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Of each three bits the bit that the table says."""
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def numbers(register: int, dtype: Any) -> np.ndarray:
    return np.frombuffer(register.to_bytes(4, "little"), dtype)


def subtracted(dtype: Any) -> Any:
    """a - b of the numbers in two registers."""

    def sub(a: int, b: int) -> int:
        exact = numbers(a, dtype).astype(np.float64) - numbers(b, dtype).astype(np.float64)
        return int.from_bytes(exact.astype(dtype).tobytes(), "little")

    return sub


OPERATIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "cvt.u32.u16": lambda a: a & 0xFFFF,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.rn.bf16x2": subtracted(ml_dtypes.bfloat16),
    "sub.rn.f32": subtracted(np.float32),
}


def bfloat16(half: int) -> float:
    return float(numbers(half, ml_dtypes.bfloat16)[0])


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_bytes(byte: int) -> None:
    """Each with three others beside it, so that none is taken for another."""
    four = [byte, byte ^ 0xFF, (byte * 7 + 3) % 256, (byte + 128) % 256]
    word = int.from_bytes(bytes(four), "little")
    signed = np.array(four, np.uint8).view(np.int8).tolist()
    low, high = [b & 15 for b in four], [b >> 4 for b in four]
    (pair,) = evaluate(kernels._INT8.value, [word & 0xFFFF], 1)
    assert numbers(pair, ml_dtypes.bfloat16).astype(float).tolist() == signed[:2]
    halves = evaluate(kernels._INT4.value, [word & 0xFFFF], 4)
    assert [bfloat16(half) for half in halves] == [n - 8 for n in (*low[:2], *high[:2])]
    floats = evaluate(single._INT8_FLOAT.value, [word], 4)
    assert [float(numbers(f, np.float32)[0]) for f in floats] == signed
    halves = evaluate(int4._INT4.value, [word], 8)
    order = [half[i] for half in (low, high) for i in (0, 2, 1, 3)]
    assert [bfloat16(half) for half in halves] == [128 + n for n in order]
