"""The Triton kernel of the experts for so few rows that hardly two share an expert, with int8 weights.

On the ordinary cores: weights go from memory to registers, and only what is needed is multiplied, where operands of
tensor cores would go through shared memory and have 16 columns.
"""

import triton
import triton.language as tl

from m1jax.kernels.experts.kernels import weights
from m1jax.kernels.gpu.kernels import number_of, sums_of_runs

# Four bytes to float32, as PTX: a byte is the lowest of a number from 2^23 on, from which that is subtracted.
_INT8_FLOAT = tl.constexpr("""{
.reg .b32 u, b<4>;
.reg .f32 f<4>;
xor.b32 u, $4, 0x80808080;
prmt.b32 b0, u, 0x4B000000, 0x7440;
prmt.b32 b1, u, 0x4B000000, 0x7441;
prmt.b32 b2, u, 0x4B000000, 0x7442;
prmt.b32 b3, u, 0x4B000000, 0x7443;
mov.b32 f0, b0;
mov.b32 f1, b1;
mov.b32 f2, b2;
mov.b32 f3, b3;
sub.rn.f32 $0, f0, 0f4B000080;
sub.rn.f32 $1, f1, 0f4B000080;
sub.rn.f32 $2, f2, 0f4B000080;
sub.rn.f32 $3, f3, 0f4B000080;
}""")


@triton.jit
def floats_of_int8(w, PTX: tl.constexpr):
    """int8 in float32."""
    if PTX:
        return tl.inline_asm_elementwise(_INT8_FLOAT, "=f,=f,=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=4)
    return w.to(tl.float32)


@triton.jit
def forward_of_rows(
    x,
    values,
    scales,
    layer,
    chosen,
    out,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    k: tl.constexpr,
    N: tl.constexpr,
    GATED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PTX: tl.constexpr,
):
    """As `kernels.forward` with int8 weights, an assignment by itself."""
    RUN: tl.constexpr = 16
    STEPS: tl.constexpr = (I + BI * SPLIT - 1) // (BI * SPLIT)
    EVEN: tl.constexpr = I % (BI * SPLIT) == 0
    a = tl.program_id(0) % N  # those that share an expert read its weights at the same time
    split = tl.program_id(1)
    e = tl.load(chosen + a)
    if e >= E:
        return
    channel = (tl.program_id(0) // N) * BO + tl.arange(0, BO)
    o = tl.minimum(channel, O - 1)
    x += (a // k if BY_TOKEN else a).to(tl.int64) * I
    matrix = (number_of(layer, L) * E + e) * ((2 if GATED else 1) * O)
    values += matrix * I
    scales += matrix
    first = tl.zeros((BO, BI // RUN), tl.float32)
    second = tl.zeros((BO, BI // RUN), tl.float32)
    for at in range(split * STEPS, (split + 1) * STEPS):
        i = at * BI + tl.arange(0, BI)
        # First what takes longest to come.
        w = weights(values, o, i, I, EVEN)
        if GATED:
            up = weights(values, o + O, i, I, EVEN)
        xs = tl.load(x + i, mask=i < I, other=0).to(tl.float32)
        first += sums_of_runs(floats_of_int8(w, PTX) * xs[None, :], RUN)
        if GATED:
            second += sums_of_runs(floats_of_int8(up, PTX) * xs[None, :], RUN)
    y = tl.sum(first, axis=1) * tl.load(scales + o)
    if GATED:
        z = tl.sum(second, axis=1) * tl.load(scales + o + O)
        y = y * tl.sigmoid(y) * z
    there = out + (split.to(tl.int64) * N + a) * O + channel
    tl.store(there, y.to(out.dtype.element_ty), mask=channel < O)
