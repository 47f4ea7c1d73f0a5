"""The Triton kernels of the experts: products of rows with the matrix of each row's expert, and the weights' gradient.

A row is an assignment a = n·k + j of token n to its j-th expert. A tile is up to R rows of one expert. Tiles are listed
in a table made from the sorted assignments or, for few rows, found by each program on its own, so that a decode step
launches nothing but its products. Weights are read where they lie, in the stack of all layers.

Products with narrow weights: values are converted in registers, where the left operand of a matrix instruction may be,
so the forward product is W xᵀ; int8 scales come after the sum, int4 scales after the sum over each group.
"""

import triton
import triton.language as tl

from m1jax.kernels.gpu.kernels import number_of

# Two bytes to bfloat16 numbers, as PTX: an integer below 128 is the mantissa of a number from 128 on, from which 128 is
# subtracted, or what makes it signed.
_INT8 = tl.constexpr("""{
.reg .b32 a, b;
prmt.b32 a, $1, 0, 0x4140;
lop3.b32 b, a, 0x00800080, 0x43004300, 0xEA;
lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA;
sub.rn.bf16x2 $0, a, b;
}""")
_INT4 = tl.constexpr("""{
.reg .b32 a, b, m;
cvt.u32.u16 a, $4;
prmt.b32 a, a, 0, 0x4140;
shr.u32 b, a, 4;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000f000f, 0x43004300, 0xEA;
mov.b32 m, 0x43084308;
sub.rn.bf16x2 a, a, m;
sub.rn.bf16x2 b, b, m;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
}""")


@triton.jit
def from_int8(w, TYPE: tl.constexpr, PTX: tl.constexpr):
    """int8 in another type."""
    if PTX:
        return tl.inline_asm_elementwise(_INT8, "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)
    return w.to(TYPE)


@triton.jit
def halves(w, SHIFT: tl.constexpr, TYPE: tl.constexpr):
    """The integers in four bits of words."""
    return (((w >> SHIFT) & 15).to(tl.int8) - 8).to(TYPE)


@triton.jit
def from_int4(pointer, o, j, WIDTH: tl.constexpr, TYPE: tl.constexpr, PTX: tl.constexpr):
    """The integers in the low and in the high halves of bytes, each `[o, 2·j]`, of the words j of rows of WIDTH words.

    Read as words of two bytes: a thread's operands of a matrix instruction are pairs, which single bytes would be made
    into one by one.
    """
    w = weights(pointer.to(tl.pointer_type(tl.int16)), o, j, WIDTH, True)
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            _INT4, "=h,=h,=h,=h,h", [w], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    else:
        a, b = halves(w, 0, TYPE), halves(w, 8, TYPE)
        c, d = halves(w, 4, TYPE), halves(w, 12, TYPE)
    low = tl.reshape(tl.join(a, b), (w.shape[0], 2 * w.shape[1]))
    high = tl.reshape(tl.join(c, d), (w.shape[0], 2 * w.shape[1]))
    return low, high


@triton.jit
def tile_of(table, pid, BLOCKS: tl.constexpr):
    """(expert, block of channels, first sorted row, rows) of a program, by the table.

    A table entry is expert, first sorted row, rows, and first tile and size of a span of tiles of this expert, which
    take the blocks of channels together, so that a block of weights read by one is in the cache for the others.
    """
    entry = table + (pid // BLOCKS) * 5
    start = tl.load(entry + 3)
    size = tl.load(entry + 4)
    local = pid - start * BLOCKS
    entry = table + (start + local % size) * 5
    return tl.load(entry), local // size, tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def rows_of(order, first, count, R: tl.constexpr):
    """(assignments `[R]`, valid `[R]`) of `count` sorted rows."""
    row = tl.arange(0, R)
    return tl.load(order + first + row, mask=row < count, other=0), row < count


@triton.jit
def tile_among_few(
    chosen, pid, BLOCKS: tl.constexpr, R: tl.constexpr, E: tl.constexpr, N: tl.constexpr, POWER: tl.constexpr
):
    """As `tile_of`: the program of an expert's first, R+1st, ... assignment has a tile, the others have no rows."""
    me = pid // BLOCKS
    a = tl.arange(0, POWER)
    experts = tl.load(chosen + a, mask=a < N, other=E)
    e = tl.load(chosen + me)
    same = (experts == e).to(tl.int32)
    before = tl.sum(tl.where(a < me, same, 0), axis=0)
    slot = tl.cumsum(same, axis=0) - 1 - before
    match = (same[None, :] > 0) & (slot[None, :] == tl.arange(0, R)[:, None])
    rows = tl.sum(tl.where(match, a[None, :], 0), axis=1)
    valid = tl.sum(match.to(tl.int32), axis=1) > 0
    count = tl.where((e < E) & (before % R == 0), 1, 0)
    return e, pid % BLOCKS, rows, valid, count


@triton.jit
def weights(pointer, o, i, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """`[o, i]` of a matrix of rows of WIDTH stored values; zero past the end of a row."""
    where = pointer + o[:, None] * WIDTH + i[None, :]
    if EVEN:
        return tl.load(where)
    return tl.load(where, mask=(i < WIDTH)[None, :], other=0)


@triton.jit
def columns(pointer, rows, i, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """x[rows, i] transposed, `[i, rows]`; zero past the end of a row."""
    where = pointer + rows[None, :].to(tl.int64) * WIDTH + i[:, None]
    if EVEN:
        return tl.load(where)
    return tl.load(where, mask=(i < WIDTH)[:, None], other=0)


@triton.jit
def accumulate_group(
    acc,
    low_x,
    high_x,
    pointer,
    scales,
    o,
    g,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Adds the group g of in-channels of int4 weights: `[o, rows]`."""
    low, high = from_int4(pointer, o, g * (GROUP // 4) + tl.arange(0, GROUP // 4), I // 4, low_x.dtype, PTX)
    part = tl.dot(low, low_x, input_precision=PRECISION)
    part = tl.dot(high, high_x, part, input_precision=PRECISION)
    return acc + part * tl.load(scales + o * (I // GROUP) + g)[:, None]


@triton.jit
def accumulate_exactly(
    acc,
    x,
    rows,
    pointer,
    scales,
    o,
    at,
    g,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same of float32 x at group `at`, a piece of the channels at a time: wider operands would be spilled."""
    HALF: tl.constexpr = GROUP // 2
    part = tl.zeros(acc.shape, tl.float32)
    for first in range(0, HALF, PIECE):
        j = first + tl.arange(0, PIECE)
        low_x = columns(x, rows, at * GROUP + j, I, EVEN)
        high_x = columns(x, rows, at * GROUP + HALF + j, I, EVEN)
        words = (g * HALF + first) // 2 + tl.arange(0, PIECE // 2)
        low, high = from_int4(pointer, o, words, I // 4, low_x.dtype, False)
        part = tl.dot(low, low_x, part, input_precision=PRECISION)
        part = tl.dot(high, high_x, part, input_precision=PRECISION)
    return acc + part * tl.load(scales + o * (I // GROUP) + g)[:, None]


@triton.jit
def tile(
    x,
    values,
    scales,
    layer,
    out,
    raw,
    e,
    block,
    a,
    valid,
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
    RAW: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """What `forward` says, for a block of channels and the assignments `a` `[R]` of expert e; the valid count."""
    PARTS: tl.constexpr = 2 if GATED else 1
    rows = a // k if BY_TOKEN else a
    o = tl.minimum(block * BO + tl.arange(0, BO), O - 1)  # rows past the end are computed in vain
    WIDTH: tl.constexpr = I // 2 if BITS == 4 else I
    matrix = (number_of(layer, L) * E + e) * (PARTS * O)
    pointer = values + matrix * WIDTH
    if BITS == 4:
        scales += matrix * (I // GROUP)
    elif BITS == 8:
        scales += matrix
    first = tl.zeros((BO, R), tl.float32)
    second = tl.zeros((BO, R), tl.float32)
    STEP: tl.constexpr = GROUP if BITS == 4 else BI
    STEPS: tl.constexpr = (I + STEP - 1) // STEP
    PER_SPLIT: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    split = tl.program_id(1)
    for step in range(0, PER_SPLIT):
        at = split * PER_SPLIT + step
        if BITS == 4 and PRECISION == "ieee":
            PIECE: tl.constexpr = BI if BI < GROUP // 2 else GROUP // 2
            WHOLE: tl.constexpr = STEPS % SPLIT == 0
            g = tl.minimum(at, STEPS - 1)
            first = accumulate_exactly(first, x, rows, pointer, scales, o, at, g, I, GROUP, WHOLE, PIECE, PRECISION)
            if GATED:
                second = accumulate_exactly(
                    second, x, rows, pointer, scales, o + O, at, g, I, GROUP, WHOLE, PIECE, PRECISION
                )
        elif BITS == 4:
            half = at * GROUP + tl.arange(0, GROUP // 2)
            low = columns(x, rows, half, I, STEPS % SPLIT == 0)
            high = columns(x, rows, half + GROUP // 2, I, STEPS % SPLIT == 0)
            at = tl.minimum(at, STEPS - 1)
            first = accumulate_group(first, low, high, pointer, scales, o, at, I, GROUP, PRECISION, PTX)
            if GATED:
                second = accumulate_group(second, low, high, pointer, scales, o + O, at, I, GROUP, PRECISION, PTX)
        else:
            EVEN: tl.constexpr = I % (BI * SPLIT) == 0
            i = at * BI + tl.arange(0, BI)
            xt = columns(x, rows, i, I, EVEN)
            w = weights(pointer, o, i, I, EVEN)
            if BITS == 8:
                w = from_int8(w, xt.dtype, PTX)
            first = tl.dot(w, xt, first, input_precision=PRECISION)
            if GATED:
                w = weights(pointer, o + O, i, I, EVEN)
                if BITS == 8:
                    w = from_int8(w, xt.dtype, PTX)
                second = tl.dot(w, xt, second, input_precision=PRECISION)
    if BITS == 8:
        first *= tl.load(scales + o)[:, None]
        if GATED:
            second *= tl.load(scales + o + O)[:, None]
    channel = block * BO + tl.arange(0, BO)
    inside = (channel < O)[:, None] & valid[None, :]
    place = a[None, :].to(tl.int64)
    if RAW:
        kind = raw.dtype.element_ty
        there = raw + place * (2 * O) + channel[:, None]
        tl.store(there, first.to(kind), mask=inside)
        tl.store(there + O, second.to(kind), mask=inside)
    if GATED:
        first = first * tl.sigmoid(first) * second
    there = out + (split.to(tl.int64) * N + place) * O + channel[:, None]
    tl.store(there, first.to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    x,
    values,
    scales,
    layer,
    table,
    order,
    out,
    raw,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    k: tl.constexpr,
    N: tl.constexpr,
    POWER: tl.constexpr,
    GATED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FEW: tl.constexpr,
    RAW: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[a] = W_e x, or with GATED silu(W1 x) ⊙ W3 x where `[W1; W3]` has 2·O rows; RAW also writes W1 x, W3 x.

    With SPLIT > 1 the in-channels are shared among programs, `out` is `[SPLIT, N, O]` and to be summed.
    """
    BLOCKS: tl.constexpr = (O + BO - 1) // BO
    HALF: tl.constexpr = R // 2
    pid = tl.program_id(0)
    if FEW:
        e, block, a, valid, count = tile_among_few(order, pid, BLOCKS, R, E, N, POWER)
    else:
        e, block, first, count = tile_of(table, pid, BLOCKS)
    if count == 0:
        return
    if not FEW:
        a, valid = rows_of(order, first, count, R)
    if R >= 128 and not FEW:
        if count <= HALF:  # an expert's last rows: half a tile is enough for half of these
            last, real = rows_of(order, first, count, HALF)
            tile(
                x, values, scales, layer, out, raw, e, block, last, real, O, I, L, E, k, N, GATED, BY_TOKEN, BITS,
                GROUP, RAW, SPLIT, HALF, BO, BI, PRECISION, PTX,
            )  # fmt: skip
            return
    tile(
        x, values, scales, layer, out, raw, e, block, a, valid, O, I, L, E, k, N, GATED, BY_TOKEN, BITS, GROUP, RAW,
        SPLIT, R, BO, BI, PRECISION, PTX,
    )  # fmt: skip


@triton.jit
def backward_rows(
    d,
    values,
    scales,
    layer,
    table,
    order,
    out,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[a, i] = Σ_o d[a, o] W_e[o, i]; for int4, BI is the group."""
    BLOCKS: tl.constexpr = (I + BI - 1) // BI
    e, block, first, count = tile_of(table, tl.program_id(0), BLOCKS)
    if count == 0:
        return
    a, valid = rows_of(order, first, count, R)
    WIDTH: tl.constexpr = I // 2 if BITS == 4 else I
    matrix = (number_of(layer, L) * E + e) * O
    pointer = values + matrix * WIDTH
    i = block * BI + tl.arange(0, BI)
    acc = tl.zeros((R, BI), tl.float32)
    place = a[:, None].to(tl.int64)
    for at in range(0, (O + BO - 1) // BO):
        o = at * BO + tl.arange(0, BO)
        real = o < O
        left = tl.load(d + place * O + o[None, :], mask=real[None, :], other=0)
        # Past the end d is zero, and whatever is read is finite.
        row = tl.minimum(o, O - 1)
        if BITS == 4:
            half = block * (GROUP // 2) + tl.arange(0, GROUP // 2)
            packed = tl.load(pointer + row[:, None] * WIDTH + half[None, :])
            pair = tl.join((packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8)
            w = tl.reshape(tl.permute(pair, (0, 2, 1)), (BO, BI)).to(tl.float32)
            w *= tl.load(scales + (matrix + row) * (I // GROUP) + block)[:, None]
        else:
            w = weights(pointer, row, i, WIDTH, I % BI == 0)
            if BITS == 8:
                w = w.to(tl.float32) * tl.load(scales + matrix + row)[:, None]
        acc = tl.dot(left, w.to(left.dtype), acc, input_precision=PRECISION)
    tl.store(out + place * I + i[None, :], acc, mask=valid[:, None] & (i < I)[None, :])


@triton.jit
def backward_weights(
    d,
    x,
    order,
    bounds,
    out,
    O: tl.constexpr,
    I: tl.constexpr,
    k: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e, o, i] = Σ_a d[a, o] x[a, i] over the rows of expert e; `bounds` `[E + 1]` are their ends in `order`."""
    across: tl.constexpr = (I + BI - 1) // BI
    block = tl.program_id(0)
    e = tl.program_id(1)
    o = (block // across) * BO + tl.arange(0, BO)
    i = (block % across) * BI + tl.arange(0, BI)
    start = tl.load(bounds + e)
    end = tl.load(bounds + e + 1)
    acc = tl.zeros((BO, BI), tl.float32)
    for row in range(start, end, R):
        r = row + tl.arange(0, R)
        valid = r < end
        a = tl.load(order + r, mask=valid, other=0)
        left = tl.load(d + a[None, :].to(tl.int64) * O + o[:, None], mask=valid[None, :] & (o < O)[:, None], other=0)
        rows = a // k if BY_TOKEN else a
        right = tl.load(
            x + rows[:, None].to(tl.int64) * I + i[None, :], mask=valid[:, None] & (i < I)[None, :], other=0
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    there = out + e.to(tl.int64) * (O * I) + o[:, None] * I + i[None, :]
    tl.store(there, acc.to(out.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])
