"""Triton kernels for the tests of what runs kernels."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, out, rounded, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a + square), tl.load(b + square))
    tl.store(out + square, c)
    tl.store(rounded + square, c.to(tl.bfloat16))


@triton.jit
def add(x, amount, out, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + index, tl.load(x + index) + amount)
