"""The Triton kernels of lightning attention: a sweep over chunks with the state on chip, and the decode step.

Forward and all three gradients are the same sweep. With M_ij = λ^(i-j) for j ≤ i, else 0, and a state S = Σ bᵀ c that
decays by λ from token to token,

    out_i = Σ_j M_ij (a_i·b_j) c_j + λ^(i+1) a_i S

gives, written (a, b, c), o for (q, k, v) and dq for (do, v, k); from the last token to the first, so with M transposed,
dk for (v, do, q) and dv for (k, q, do). A program keeps the columns of S that belong to a block of c's channels, so it
needs all channels of a and b, a block of c, and writes a block of out.

`tl.dot(tl.trans(x), …)` is only ever of an x that was loaded: Triton up to 3.7.0 miscompiles it for accumulators.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return r * r


@triton.jit
def rows(pointer, stride: tl.constexpr, channels, valid, SILU: tl.constexpr):
    """C tokens of float32 `[C, channels]`, zero where not valid."""
    token = tl.arange(0, valid.shape[0])
    x = tl.load(pointer + token[:, None] * stride + channels[None, :], mask=valid[:, None], other=0.0)
    if SILU:
        x = x.to(tl.float32)
        x *= sigmoid(x)
    return x


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
    runs,
    origin,
    valid,
    tokens,
    block,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    A_SILU: tl.constexpr,
    B_SILU: tl.constexpr,
    C_SILU: tl.constexpr,
    RAW: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sweeps over `tokens` tokens, of which the first `valid` count; returns the state after the last.

    a, b, c, out: pointers to the first token, A, B, C, OUT elements from token to token; `raw`, as out, is what out is
    the gradient of after silu, if RAW. s: float32 [D, WIDTH]. chunk_loss: λ^CHUNK - 1. runs: pointer to int32, see
    `gpu.py`. origin: tokens of the row before the first. block: first channel of c and out.
    """
    TYPE: tl.constexpr = a.dtype.element_ty
    all_channels = tl.arange(0, D)
    own = block + tl.arange(0, WIDTH)
    index = tl.arange(0, CHUNK)
    if REVERSED:
        age = index[None, :] - index[:, None]
    else:
        age = index[:, None] - index[None, :]
    decay = tl.where(age >= 0, tl.exp2(log2_decay * tl.maximum(age, 0)), 0.0)  # [out, source]
    from_start = tl.exp2(log2_decay * (index + 1))
    chunks = tl.cdiv(valid, CHUNK)
    for step in tl.range(0, chunks):
        chunk = step
        if REVERSED:
            chunk = chunks - 1 - step
        first = tl.cast(chunk * CHUNK, tl.int64)
        count = tl.minimum(valid - chunk * CHUNK, CHUNK)
        here = index < count
        to_end = tl.exp2(log2_decay * tl.maximum(count - 1 - index, 0))
        if REVERSED:
            reads, feeds = to_end, from_start
        else:
            reads, feeds = from_start, to_end
        loss = tl.where(count == CHUNK, chunk_loss, tl.exp2(log2_decay * count) - 1.0)
        inside = decay
        if PACKED:
            run = tl.load(runs + first + index, mask=here, other=-1)
            # The run the state belongs to, before and after the chunk; of a padded token, ~run.
            before = tl.load(runs + first - 1, mask=origin + first > 0, other=0)
            before = tl.where(before < 0, ~before, before)
            after = tl.load(runs + first + count - 1)
            after = tl.where(after < 0, ~after, after)
            here &= run >= 0
            inside = tl.where(run[:, None] == run[None, :], decay, 0.0)
            length = tl.max(tl.where(run >= 0, index + 1, 0))
            to_end = tl.exp2(log2_decay * tl.maximum(length - 1 - index, 0))
            old = tl.where(run == before, from_start, 0.0)
            new = tl.where(run == after, to_end, 0.0)
            if REVERSED:
                reads, feeds = new, old
            else:
                reads, feeds = old, new
            loss = tl.where(length == CHUNK, chunk_loss, tl.exp2(log2_decay * length) - 1.0)
            loss = tl.where(before == after, loss, -1.0)
        b_rows = rows(b + first * B, B, all_channels, here, B_SILU)
        c_rows = rows(c + first * C, C, own, here, C_SILU)
        fed = (c_rows.to(tl.float32) * feeds[:, None]).to(TYPE)
        b_rows = b_rows.to(TYPE)
        if WRITE:
            a_rows = rows(a + first * A, A, all_channels, here, A_SILU).to(TYPE)
            scores = tl.dot(a_rows, tl.trans(b_rows), input_precision=PRECISION)
            o = tl.dot(a_rows, s.to(TYPE), input_precision=PRECISION) * reads[:, None]
            o = tl.dot((scores * inside).to(TYPE), c_rows.to(TYPE), o, input_precision=PRECISION)
            if RAW:
                x = rows(raw + first * OUT, OUT, own, here, False).to(tl.float32)
                gate = sigmoid(x)
                o *= gate * (1.0 + x * (1.0 - gate))
            o = tl.where(here[:, None], o, 0.0)
            tl.store(
                out + first * OUT + index[:, None] * OUT + own[None, :],
                o.to(out.dtype.element_ty),
                mask=(chunk * CHUNK + index < tokens)[:, None],
            )
        s += s * loss
        s = tl.dot(tl.trans(b_rows), fed, s, input_precision=PRECISION)
    if WRITE:
        for chunk in tl.range(chunks, tl.cdiv(tokens, CHUNK)):
            at = chunk * CHUNK + index
            place = out + tl.cast(chunk * CHUNK, tl.int64) * OUT + index[:, None] * OUT + own[None, :]
            tl.store(place, tl.zeros([CHUNK, WIDTH], out.dtype.element_ty), mask=(at < tokens)[:, None])
    return s


@triton.jit
def part_of_row(lengths, T, PART, PARTS: tl.constexpr):
    """Row, first token, tokens and valid tokens of this program's part of a row."""
    row = tl.program_id(2) // PARTS
    first = (tl.program_id(2) % PARTS) * PART
    tokens = tl.minimum(T - first, PART)
    valid = tl.minimum(tl.maximum(tl.load(lengths + row) - first, 0), tokens)
    return row.to(tl.int64) * T + first, first, tokens, valid


@triton.jit
def square(layer, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets of this program's [D, WIDTH] of the states [P, B, PARTS, H, D, D]."""
    channels = tl.arange(0, D)[:, None]
    own = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))[None, :]
    place = (layer.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * H + tl.program_id(1)
    inner = own * D + channels if TRANSPOSED else channels * D + own
    return place * D * D + inner


@triton.jit
def forward(
    qkv,
    decays,
    lengths,
    runs,
    layer,
    state,
    T,
    PART,
    out,
    final,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (D/WIDTH, H, B·PARTS): o and the final state of each part of a row of T tokens, PART tokens a part.

    qkv [B, T, H, 3, D]; decays float32 [2, H], log2 λ and λ^CHUNK - 1; lengths int32 [B]; runs int32 [B, T] if PACKED;
    layer int32 [1]; state and final (they may be the same memory) float32 [P, B, PARTS, H, D, D], zero if FRESH;
    out [B, T, H, D] if WRITE.
    """
    h = tl.program_id(1)
    token, first, tokens, valid = part_of_row(lengths, T, PART, PARTS)
    where = square(tl.load(layer), H, D, WIDTH, False)
    if FRESH:
        s = tl.zeros([D, WIDTH], tl.float32)
    else:
        s = tl.load(state + where)
    x = qkv + (token * H + h) * 3 * D
    s = sweep(
        x, x + D, x + 2 * D, x, out + (token * H + h) * D, s, tl.load(decays + h), tl.load(decays + H + h),
        runs + token, first, valid, tokens, tl.program_id(0) * WIDTH,
        3 * H * D, 3 * H * D, 3 * H * D, H * D, True, True, True, False, False, PACKED,
        WRITE, D, WIDTH, CHUNK, PRECISION,
    )  # fmt: skip
    tl.store(final + where, s)


@triton.jit
def backward(
    qkv,
    grad,
    decays,
    lengths,
    runs,
    state,
    given,
    T,
    PART,
    dqkv,
    final,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE: tl.constexpr,
    FINAL: tl.constexpr,
    ROLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes one of the three of dqkv (`given` is the same memory), ROLE "q", "k" or "v"; grid as of `forward`.

    grad [B, T, H, D] is of o. For "q", state [B, PARTS, H, D, D] is the state before each part; for "k" and "v" it is
    the gradient of the state after it, and with FINAL "v" writes that of the state before it to final.
    """
    h = tl.program_id(1)
    token, first, tokens, valid = part_of_row(lengths, T, PART, PARTS)
    if FRESH:
        s = tl.zeros([D, WIDTH], tl.float32)
    else:
        s = tl.load(state + square(tl.program_id(2) * 0, H, D, WIDTH, ROLE != "v"))
    q = qkv + (token * H + h) * 3 * D
    dq = dqkv + (token * H + h) * 3 * D
    k, v, do = q + D, q + 2 * D, grad + (token * H + h) * D
    log2_decay, chunk_loss, block = tl.load(decays + h), tl.load(decays + H + h), tl.program_id(0) * WIDTH
    if ROLE == "q":
        s = sweep(
            do, v, k, q, dq, s, log2_decay, chunk_loss, runs + token, first, valid, tokens, block,
            H * D, 3 * H * D, 3 * H * D, 3 * H * D, False, True, True, True,
            False, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
    elif ROLE == "k":
        s = sweep(
            v, do, q, k, dq + D, s, log2_decay, chunk_loss, runs + token, first, valid, tokens, block,
            3 * H * D, H * D, 3 * H * D, 3 * H * D, True, False, True, True,
            True, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
    else:
        s = sweep(
            k, q, do, v, dq + 2 * D, s, log2_decay, chunk_loss, runs + token, first, valid, tokens, block,
            3 * H * D, 3 * H * D, H * D, 3 * H * D, True, True, False, True,
            True, PACKED, WRITE, D, WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
    if FINAL:
        tl.store(final + square(tl.program_id(2) * 0, H, D, WIDTH, False), s)


@triton.jit
def step(
    qkv,
    losses,
    lengths,
    layer,
    state,
    out,
    new_state,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token: S ← S + (λ - 1) S + kᵀ v, o = q S, for WIDTH columns of one head of one row.

    qkv [B, H, 3, D]; losses float32 [H], λ - 1; lengths int32 [B], 0: leave S alone; layer int32 [1]; state and
    new_state (the same memory) float32 [P, B, H, D, D]; out [B, H, D].
    """
    block, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, D)
    own = block * WIDTH + tl.arange(0, WIDTH)
    place = (tl.load(layer).to(tl.int64) * ROWS + row) * H + h
    where = place * D * D + channels[:, None] * D + own[None, :]
    s = tl.load(state + where)
    x = qkv + (row.to(tl.int64) * H + h) * 3 * D
    q, k, v = (
        tl.load(x + channels).to(tl.float32),
        tl.load(x + D + channels).to(tl.float32),
        tl.load(x + 2 * D + own).to(tl.float32),
    )
    q, k, v = q * sigmoid(q), k * sigmoid(k), v * sigmoid(v)
    valid = tl.load(lengths + row) > 0
    new = s + s * tl.load(losses + h) + k[:, None] * v[None, :]
    new = tl.where(valid, new, s)
    tl.store(out + (row.to(tl.int64) * H + h) * D + own, tl.sum(q[:, None] * new, axis=0).to(out.dtype.element_ty))
    tl.store(new_state + where, new, mask=valid)
