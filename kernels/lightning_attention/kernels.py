"""The Triton kernels of lightning attention: a sweep over chunks with the state on chip, and the decode step.

Forward and all three gradients are the same sweep. With M_ij = λ^(i-j) for j ≤ i, else 0, and a state S = Σ bᵀ c that
decays by λ from token to token,

    out_i = Σ_j M_ij (a_i·b_j) c_j + λ^(i+1) a_i S

gives, written (a, b, c), o for (q, k, v) and dq for (do, v, k); from the last token to the first, so with M transposed,
dk for (v, do, q) and dv for (k, q, do). A program keeps the columns of S that belong to a block of c's channels, so it
needs all channels of a and b, a block of c, and writes a block of out.

`tl.dot(tl.trans(x), …)` is never of an x that a product gave: Triton up to 3.7.0 miscompiles it for accumulators.
"""

import triton
import triton.language as tl

from m1jax.kernels.gpu.kernels import number_of

# silu of two bfloat16 numbers, as PTX: half the instructions that Triton's own conversions and functions take, and the
# sweeps have none to spare. For all numbers from -6 upwards it is as far off as exact arithmetic, by its one rounding;
# below, where silu is between -0.015 and 0, by less than 5e-4.
_SILU = tl.constexpr("""{
.reg .b32 x, y, a, b;
shl.b32 x, $1, 16;
and.b32 y, $1, 0xffff0000;
mul.f32 x, x, 0f3F000000;
mul.f32 y, y, 0f3F000000;
tanh.approx.f32 a, x;
tanh.approx.f32 b, y;
fma.rn.f32 a, x, a, x;
fma.rn.f32 b, y, b, y;
cvt.rn.bf16x2.f32 $0, b, a;
}""")
_SIGMOID = tl.constexpr("""{
.reg .b32 a;
mul.f32 a, $1, 0f3F000000;
tanh.approx.f32 a, a;
fma.rn.f32 $0, a, 0f3F000000, 0f3F000000;
}""")
_MOVE = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def sigmoid(x, HOW: tl.constexpr):
    """Of float32."""
    if HOW == "tanh":
        return tl.inline_asm_elementwise(_SIGMOID, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def silu(x, HOW: tl.constexpr):
    """silu(x) in the dtype of x by "exact" or "tanh"; x itself by "none", or "move", which takes it through registers.

    PTX is called impure, because Triton computes what is pure once for each layout in which a product wants it.
    """
    if HOW == "exact":
        wide = x.to(tl.float32)
        x = (wide * sigmoid(wide, HOW)).to(x.dtype)
    elif HOW != "none":
        code: tl.constexpr = _SILU if HOW == "tanh" else _MOVE
        x = tl.inline_asm_elementwise(code, "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def less_one(x):
    """e^x - 1 of float32 x ≤ 0, near 0 by its series: λ - 1 from λ would keep few digits of slow decays."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(x > -0.5, series, tl.exp2(x * 1.4426950408889634) - 1.0)


@triton.jit
def read(pointer, chunk, count, stride: tl.constexpr, channels, CHUNK: tl.constexpr):
    """The first `count` tokens of a chunk, `[CHUNK, channels]`, and zeros."""
    token = tl.arange(0, CHUNK)
    first = tl.cast(chunk * CHUNK, tl.int64) * stride
    row = token + (tl.minimum(count, 1) - 1)  # the token itself: offsets known beforehand would take registers
    return tl.load(pointer + first + row[:, None] * stride + channels[None, :], (token < count)[:, None], 0.0)


@triton.jit
def finish(
    scores,
    c,
    o,
    raw,
    out,
    chunk,
    count,
    STRIDE: tl.constexpr,
    RAW_HOW: tl.constexpr,
    own,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the chunk's own part to o and writes its first `count` tokens."""
    o = tl.dot(scores, c, o, input_precision=PRECISION)
    if RAW_HOW != "none":
        x = read(raw, chunk, count, STRIDE, own, CHUNK).to(tl.float32)
        gate = sigmoid(x, RAW_HOW)
        o *= gate * (1.0 + x * (1.0 - gate))
    token = tl.arange(0, CHUNK)
    place = out + tl.cast(chunk * CHUNK, tl.int64) * STRIDE + token[:, None] * STRIDE + own[None, :]
    tl.store(place, o.to(out.dtype.element_ty), mask=(token < count)[:, None])


@triton.jit
def sweep(
    a,
    b,
    c,
    raw,
    out,
    s,
    log2_decay,
    chunk_loss,
    bounds,
    chunk_facts,
    T,
    origin,
    valid,
    tokens,
    block,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    A_HOW: tl.constexpr,
    B_HOW: tl.constexpr,
    C_HOW: tl.constexpr,
    RAW_HOW: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sweeps over `tokens` tokens, of which the first `valid` count; returns the state after the last.

    a, b, c, out: pointers to the first token, A, B, C, OUT elements from token to token; A_HOW, … their activation;
    raw, as out, is what out is the gradient of after silu, unless RAW_HOW is "none". s: float32 [D, WIDTH]. chunk_loss:
    λ^CHUNK - 1. bounds, chunk_facts: pointers to int32, see `forward`. T: tokens of the row, origin of them before the
    first. block: first channel of c and out.

    A step activates, multiplies, rounds, multiplies again, and each of these waits for the one before it. So programs
    are small enough for two to share a multiprocessor and fill each other's gaps.
    """
    TYPE: tl.constexpr = a.dtype.element_ty
    channels = tl.arange(0, D)
    own = block + tl.arange(0, WIDTH)
    index = tl.arange(0, CHUNK)
    if REVERSED:
        age = index[None, :] - index[:, None]
    else:
        age = index[:, None] - index[None, :]
    decay = tl.where(age >= 0, tl.exp2(log2_decay * tl.maximum(age, 0)), 0.0)  # [out, source]
    chunks = tl.cdiv(valid, CHUNK)

    if WRITE:  # first, because after the sweep it would take registers during it
        for chunk in tl.range(chunks, tl.cdiv(tokens, CHUNK)):
            place = out + tl.cast(chunk * CHUNK, tl.int64) * OUT + index[:, None] * OUT + own[None, :]
            left = (chunk * CHUNK + index < tokens)[:, None]
            tl.store(place, tl.zeros([CHUNK, WIDTH], out.dtype.element_ty), mask=left)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSED else step
        count = tl.minimum(valid - chunk * CHUNK, CHUNK)
        if WRITE:
            a_raw = read(a, chunk, count, A, channels, CHUNK)
        b_raw = read(b, chunk, count, B, channels, CHUNK)
        c_raw = read(c, chunk, count, C, own, CHUNK)

        length = count
        if PACKED:
            known = chunk_facts + chunk * 2
            length = tl.load(known)
        to_end = tl.exp2(log2_decay * tl.maximum(length - 1 - index, 0))
        from_start = tl.exp2(log2_decay * (index + tl.minimum(count, 1)))  # 1, as in `read`
        loss = tl.where(length == CHUNK, chunk_loss, tl.exp2(log2_decay * length) - 1.0)
        inside, old, new = decay, from_start, to_end
        if PACKED:
            token = bounds + tl.cast(chunk * CHUNK, tl.int64) + index
            begin = tl.load(token, mask=index < count, other=T) - origin - chunk * CHUNK
            end = tl.load(token + T, mask=index < count, other=-1) - origin - chunk * CHUNK
            if REVERSED:
                inside = tl.where(index[None, :] <= end[:, None], decay, 0.0)
            else:
                inside = tl.where(index[None, :] >= begin[:, None], decay, 0.0)
            old = tl.where(begin < 0, from_start, 0.0)
            new = tl.where(end >= tl.maximum(length - 1, 0), to_end, 0.0)  # padding has ends below 0
            loss = tl.where(tl.load(known + 1) > 0, loss, -1.0)
        reads, feeds = old, new
        if REVERSED:
            reads, feeds = new, old

        b_tile = silu(b_raw, B_HOW)
        c_tile = silu(c_raw, C_HOW)
        fed = (c_tile.to(tl.float32) * feeds[:, None]).to(TYPE)
        if WRITE:
            a_tile = silu(a_raw, A_HOW)
            products = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
            o = tl.dot(a_tile, s.to(TYPE), input_precision=PRECISION) * reads[:, None]
            scores = (products * inside).to(TYPE)
            written = tl.minimum(tokens - chunk * CHUNK, CHUNK)
            finish(scores, c_tile, o, raw, out, chunk, written, OUT, RAW_HOW, own, CHUNK, PRECISION)
        s += s * loss
        s = tl.dot(tl.trans(b_tile), fed, s, input_precision=PRECISION)
    return s


@triton.jit
def part_of_row(lengths, T, START, PART, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """Of this program's part of a row: first token in batch and row, tokens, valid tokens, places in tables."""
    row = tl.program_id(2) // PARTS
    first = START + (tl.program_id(2) % PARTS) * PART
    tokens = tl.maximum(tl.minimum(T - first, PART), 0)
    valid = tl.minimum(tl.maximum(tl.load(lengths + row) - first, 0), tokens)
    at_facts = (row * tl.cdiv(T, CHUNK) + first // CHUNK) * 2
    return row.to(tl.int64) * T + first, first, tokens, valid, row.to(tl.int64) * 2 * T + first, at_facts


@triton.jit
def square(
    states,
    layer,
    LAYERS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Pointers to this program's [D, WIDTH] of the states [LAYERS, B, PARTS, H, D, D].

    The layer's number n is read from memory each time, and n(n + 1) mod 2, which is 0, added to the channels, or the
    pointers would be kept in registers during the sweep.
    """
    number = tl.load(layer)
    nothing = (number * (number + 1)) & 1
    channels = (nothing + tl.arange(0, D))[:, None]
    own = (nothing + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))[None, :]
    place = (number_of(layer, LAYERS) * tl.num_programs(2) + tl.program_id(2)) * H + tl.program_id(1)
    inner = own * D + channels if TRANSPOSED else channels * D + own
    return states + place * D * D + inner


@triton.jit
def forward(
    qkv,
    decays,
    lengths,
    bounds,
    chunk_facts,
    layer,
    state,
    T,
    START,
    PART,
    out,
    final,
    PARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    A_HOW: tl.constexpr,
    B_HOW: tl.constexpr,
    C_HOW: tl.constexpr,
    RAW_HOW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (D/WIDTH, H, B·PARTS): o and the final state of each part, PART tokens, of a row of T tokens from START on.

    qkv [B, T, H, 3, D]; decays float32 [H], log λ; lengths int32 [B]; layer int32 [1]; state and
    final (they may be the same memory) float32 [LAYERS, B, PARTS, H, D, D], zero if FRESH; out [B, T, H, D] if WRITE.
    A_HOW, B_HOW, C_HOW: activations of q, k, v; RAW_HOW: "none".

    If PACKED: bounds int32 [B, 2, T], first and last token of each token's segment (-1 if the state before the row
    belongs to it; T and -1 at padding); chunk_facts int32 [B, chunks, 2], for each chunk its length up to the last
    valid token, and whether no segment starts in it.
    """
    h = tl.program_id(1)
    token, first, tokens, valid, at_bounds, at_facts = part_of_row(lengths, T, START, PART, PARTS, CHUNK)
    facts = chunk_facts + at_facts
    log_decay = tl.load(decays + h)
    log2_decay = log_decay * 1.4426950408889634
    if FRESH:
        s = tl.zeros([D, WIDTH], tl.float32)
    else:
        s = tl.load(square(state, layer, LAYERS, H, D, WIDTH, False))
    x = qkv + (token * H + h) * 3 * D
    s = sweep(
        x, x + D, x + 2 * D, x, out + (token * H + h) * D, s, log2_decay, less_one(log_decay * CHUNK),
        bounds + at_bounds, facts, T, first, valid, tokens, tl.program_id(0) * WIDTH,
        3 * H * D, 3 * H * D, 3 * H * D, H * D, A_HOW, B_HOW, C_HOW, RAW_HOW, False, PACKED,
        WRITE, D, WIDTH, CHUNK, PRECISION, STAGES,
    )  # fmt: skip
    tl.store(square(final, layer, LAYERS, H, D, WIDTH, False), s)


@triton.jit
def backward(
    qkv,
    grad,
    decays,
    lengths,
    bounds,
    chunk_facts,
    layer,
    state,
    given,
    T,
    START,
    PART,
    dqkv,
    final,
    PARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    FINAL: tl.constexpr,
    ROLE: tl.constexpr,
    A_HOW: tl.constexpr,
    B_HOW: tl.constexpr,
    C_HOW: tl.constexpr,
    RAW_HOW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes one of the three of dqkv (`given` is the same memory), ROLE "q", "k" or "v"; grid as of `forward`.

    grad [B, T, H, D] is of o; layer is 0; A_HOW, … activate the role's a, b and c. For "q", state [B, PARTS, H, D, D]
    is the state before each part; for "k" and "v" it is the gradient of the state after it, and with FINAL "v" writes
    that of the state before it to final.
    """
    h = tl.program_id(1)
    token, first, tokens, valid, at_bounds, at_facts = part_of_row(lengths, T, START, PART, PARTS, CHUNK)
    facts = chunk_facts + at_facts
    if FRESH:
        s = tl.zeros([D, WIDTH], tl.float32)
    else:
        s = tl.load(square(state, layer, LAYERS, H, D, WIDTH, ROLE != "v"))
    q = qkv + (token * H + h) * 3 * D
    dq = dqkv + (token * H + h) * 3 * D
    k, v, do = q + D, q + 2 * D, grad + (token * H + h) * D
    log_decay, block = tl.load(decays + h), tl.program_id(0) * WIDTH
    log2_decay, chunk_loss = log_decay * 1.4426950408889634, less_one(log_decay * CHUNK)
    if ROLE == "q":
        s = sweep(
            do, v, k, q, dq, s, log2_decay, chunk_loss, bounds + at_bounds, facts, T, first,
            valid, tokens, block,
            H * D, 3 * H * D, 3 * H * D, 3 * H * D, A_HOW, B_HOW, C_HOW, RAW_HOW,
            False, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION, STAGES,
        )  # fmt: skip
    elif ROLE == "k":
        s = sweep(
            v, do, q, k, dq + D, s, log2_decay, chunk_loss, bounds + at_bounds, facts, T, first,
            valid, tokens, block,
            3 * H * D, H * D, 3 * H * D, 3 * H * D, A_HOW, B_HOW, C_HOW, RAW_HOW,
            True, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION, STAGES,
        )  # fmt: skip
    else:
        s = sweep(
            k, q, do, v, dq + 2 * D, s, log2_decay, chunk_loss, bounds + at_bounds, facts, T, first,
            valid, tokens, block,
            3 * H * D, 3 * H * D, H * D, 3 * H * D, A_HOW, B_HOW, C_HOW, RAW_HOW,
            True, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION, STAGES,
        )  # fmt: skip
    if FINAL:
        tl.store(square(final, layer, LAYERS, H, D, WIDTH, False), s)


@triton.jit
def step(
    qkv,
    decays,
    lengths,
    layer,
    state,
    out,
    new_state,
    ROWS: tl.constexpr,
    LAYERS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token: S ← S + (λ - 1) S + kᵀ v, o = q S, for WIDTH columns of one head of one row.

    qkv [B, H, 3, D]; decays float32 [H], log λ; lengths int32 [B], 0: leave S alone; layer int32 [1]; state and
    new_state (the same memory) float32 [LAYERS, B, H, D, D]; out [B, H, D].
    """
    block, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, D)
    own = block * WIDTH + tl.arange(0, WIDTH)
    place = (number_of(layer, LAYERS) * ROWS + row) * H + h
    where = place * D * D + channels[:, None] * D + own[None, :]
    s = tl.load(state + where)
    x = qkv + (row.to(tl.int64) * H + h) * 3 * D
    q, k, v = (
        tl.load(x + channels).to(tl.float32),
        tl.load(x + D + channels).to(tl.float32),
        tl.load(x + 2 * D + own).to(tl.float32),
    )
    q, k, v = silu(q, "exact"), silu(k, "exact"), silu(v, "exact")
    valid = tl.load(lengths + row) > 0
    new = s + s * less_one(tl.load(decays + h)) + k[:, None] * v[None, :]
    new = tl.where(valid, new, s)
    tl.store(out + (row.to(tl.int64) * H + h) * D + own, tl.sum(q[:, None] * new, axis=0).to(out.dtype.element_ty))
    tl.store(new_state + where, new, mask=valid)
