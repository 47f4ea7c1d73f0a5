"""The Triton kernels of few rows, or a single one, times one matrix of a stack, which is read where it lies."""

import triton
import triton.language as tl

from m1jax.kernels.gpu.kernels import number_of, sums_of_runs


@triton.jit
def forward(
    x,
    stack,
    layer,
    out,
    N: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out[s, n, o] = Σ x[n, i] W[o, i] over the s-th part of i, W = stack[layer].

    W is the left operand, of which tensor cores take 64 rows at least; x is transposed.
    """
    EVEN: tl.constexpr = I % (BI * SPLIT) == 0
    STEPS: tl.constexpr = (I + BI * SPLIT - 1) // (BI * SPLIT)
    n = tl.program_id(0) * R + tl.arange(0, R)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    split = tl.program_id(2)
    matrix = stack + number_of(layer, L) * (O * I) + tl.minimum(o, O - 1)[:, None] * I
    rows = x + tl.minimum(n, N - 1)[None, :] * I
    acc = tl.zeros((BO, R), tl.float32)
    for step in range(0, STEPS):
        i = (split * STEPS + step) * BI + tl.arange(0, BI)
        if EVEN:
            w = tl.load(matrix + i[None, :])
            xt = tl.load(rows + i[:, None])
        else:
            w = tl.load(matrix + i[None, :], mask=(i < I)[None, :], other=0)
            xt = tl.load(rows + i[:, None], mask=(i < I)[:, None], other=0)
        acc = tl.dot(w, xt, acc)
    there = out + (split * N + n[None, :]) * O + o[:, None]
    tl.store(there, acc, mask=(n < N)[None, :] & (o < O)[:, None])


@triton.jit
def forward_of_row(
    x,
    stack,
    layer,
    out,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """As `forward`, for a single row: on the ordinary cores, with nothing in shared memory but x."""
    RUN: tl.constexpr = 8  # weights that a thread reads at once
    EVEN: tl.constexpr = I % (BI * SPLIT) == 0
    STEPS: tl.constexpr = (I + BI * SPLIT - 1) // (BI * SPLIT)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    split = tl.program_id(2)
    matrix = stack + number_of(layer, L) * (O * I) + tl.minimum(o, O - 1)[:, None] * I
    sums = tl.zeros((BO, BI // RUN), tl.float32)
    for step in range(0, STEPS):
        i = (split * STEPS + step) * BI + tl.arange(0, BI)
        xs = tl.load(x + i, mask=i < I, other=0).to(tl.float32)
        if EVEN:
            w = tl.load(matrix + i[None, :])
        else:
            w = tl.load(matrix + i[None, :], mask=(i < I)[None, :], other=0)
        sums += sums_of_runs(w.to(tl.float32) * xs[None, :], RUN)
    tl.store(out + split * O + o, tl.sum(sums, axis=1), mask=o < O)
