"""The Triton kernel of the experts for so few rows that hardly two share an expert, with int8 or int4 weights.

On the ordinary cores: weights go from memory to registers, and only what is needed is multiplied, where operands of
tensor cores would go through shared memory and have 16 columns.
"""

import triton
import triton.language as tl

from m1jax.kernels.experts.kernels import weights
from m1jax.kernels.gpu.kernels import number_of, sums_of_runs

# Four bytes to float32, as PTX: a byte is the lowest of a number from 2^23 on, from which that is subtracted; or a
# nibble is the highest of the mantissa of a number from 1 to 2, which is left to the caller.
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
_INT4_FLOAT = tl.constexpr("""{
.reg .b32 l, h, b<8>;
shl.b32 l, $8, 3;
shr.u32 h, $8, 1;
lop3.b32 l, l, 0x78787878, 0x80808080, 0xEA;
lop3.b32 h, h, 0x78787878, 0x80808080, 0xEA;
prmt.b32 b0, l, 0x3F000000, 0x7044;
prmt.b32 b1, l, 0x3F000000, 0x7144;
prmt.b32 b2, l, 0x3F000000, 0x7244;
prmt.b32 b3, l, 0x3F000000, 0x7344;
prmt.b32 b4, h, 0x3F000000, 0x7044;
prmt.b32 b5, h, 0x3F000000, 0x7144;
prmt.b32 b6, h, 0x3F000000, 0x7244;
prmt.b32 b7, h, 0x3F000000, 0x7344;
mov.b32 $0, b0;
mov.b32 $1, b1;
mov.b32 $2, b2;
mov.b32 $3, b3;
mov.b32 $4, b4;
mov.b32 $5, b5;
mov.b32 $6, b6;
mov.b32 $7, b7;
}""")


@triton.jit
def floats_of_int8(w, PTX: tl.constexpr):
    """int8 in float32."""
    if PTX:
        return tl.inline_asm_elementwise(_INT8_FLOAT, "=f,=f,=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=4)
    return w.to(tl.float32)


@triton.jit
def floats_of_halves(w, PTX: tl.constexpr):
    """1 + n/16 for the low and the high halves n of bytes."""
    if PTX:
        return tl.inline_asm_elementwise(
            _INT4_FLOAT, "=f,=f,=f,=f,=f,=f,=f,=f,r", [w], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    return (w & 15).to(tl.float32) / 16 + 1, (w >> 4).to(tl.float32) / 16 + 1


@triton.jit
def groups_product(
    w,
    low_x,
    high_x,
    scales,
    o,
    at,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PTX: tl.constexpr,
):
    """int4 weights times x, summed over each RUN of bytes.

    With numbers f = 1 + n/16 it is Σ x (n - 8) = 16 (Σ x f - 1.5 Σ x).
    """
    RUNS: tl.constexpr = w.shape[1] // RUN
    low, high = floats_of_halves(w, PTX)
    sums = sums_of_runs(low * low_x[None, :], RUN) + sums_of_runs(high * high_x[None, :], RUN)
    x_sums = sums_of_runs((low_x + high_x)[None, :], RUN)
    g = (at * RUNS + tl.arange(0, RUNS)) * RUN // (GROUP // 2)
    scale = tl.load(scales + o[:, None] * (I // GROUP) + g[None, :], mask=(g < I // GROUP)[None, :], other=0)
    return (sums - 1.5 * x_sums) * (16 * scale)


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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PTX: tl.constexpr,
):
    """As `kernels.forward` with int8 or int4 weights, an assignment by itself."""
    tl.static_assert(BITS == 4 or BITS == 8)
    RUN: tl.constexpr = 16
    HALF: tl.constexpr = GROUP // 2
    SPAN: tl.constexpr = BI // 2 if BITS == 4 else BI  # stored values of a step
    WIDTH: tl.constexpr = I // 2 if BITS == 4 else I
    STEPS: tl.constexpr = (WIDTH + SPAN * SPLIT - 1) // (SPAN * SPLIT)
    EVEN: tl.constexpr = WIDTH % (SPAN * SPLIT) == 0
    a = tl.program_id(0) % N  # those that share an expert read its weights at the same time
    split = tl.program_id(1)
    e = tl.load(chosen + a)
    if e >= E:
        return
    channel = (tl.program_id(0) // N) * BO + tl.arange(0, BO)
    o = tl.minimum(channel, O - 1)
    x += (a // k if BY_TOKEN else a).to(tl.int64) * I
    matrix = (number_of(layer, L) * E + e) * ((2 if GATED else 1) * O)
    values += matrix * WIDTH
    if BITS == 4:
        scales += matrix * (I // GROUP)
    else:
        scales += matrix
    first = tl.zeros((BO, SPAN // RUN), tl.float32)
    second = tl.zeros((BO, SPAN // RUN), tl.float32)
    for at in range(split * STEPS, (split + 1) * STEPS):
        j = at * SPAN + tl.arange(0, SPAN)
        # First what takes longest to come.
        w = weights(values, o, j, WIDTH, EVEN)
        if GATED:
            up = weights(values, o + O, j, WIDTH, EVEN)
        if BITS == 4:
            place = x + j // HALF * GROUP + j % HALF
            low = tl.load(place, mask=j < WIDTH, other=0).to(tl.float32)
            high = tl.load(place + HALF, mask=j < WIDTH, other=0).to(tl.float32)
            first += groups_product(w, low, high, scales, o, at, I, GROUP, RUN, PTX)
            if GATED:
                second += groups_product(up, low, high, scales, o + O, at, I, GROUP, RUN, PTX)
        else:
            xs = tl.load(x + j, mask=j < WIDTH, other=0).to(tl.float32)
            first += sums_of_runs(floats_of_int8(w, PTX) * xs[None, :], RUN)
            if GATED:
                second += sums_of_runs(floats_of_int8(up, PTX) * xs[None, :], RUN)
    y = tl.sum(first, axis=1)
    if BITS == 8:
        y *= tl.load(scales + o)
    if GATED:
        z = tl.sum(second, axis=1)
        if BITS == 8:
            z *= tl.load(scales + o + O)
        y = y * tl.sigmoid(y) * z
    there = out + (split.to(tl.int64) * N + a) * O + channel
    tl.store(there, y.to(out.dtype.element_ty), mask=channel < O)
