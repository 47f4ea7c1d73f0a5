"""The Triton kernel of a few queries against the cache of one layer, read where it lies, in the stack and in pages."""

import triton
import triton.language as tl

from m1jax.kernels.gpu.kernels import number_of


@triton.jit
def few_queries(
    q,
    k,
    v,
    offset,
    layer,
    pages,
    out,
    log_sums,
    LAYERS: tl.constexpr,
    R: tl.constexpr,
    PAGES: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (SPLITS, K, B): the queries of one key head over one of SPLITS parts of the keys that they see.

    q [B, T, H, D]; k, v [LAYERS, R, K, P, D], R pages of P positions each; offset int32 [B], position of a row's first
    query among these keys, also negative or past their end; layer int32 [1]; pages int32 [B, PAGES], in which page what
    belongs to each P positions of a row is; out float32 [SPLITS, B, T, H, D], attention over the part alone;
    log_sums float32 [SPLITS, B, T, H], the logarithm of its sum of exp(score), -inf where a query sees no key of it.
    ROWS: T·H/K or more, one for each query and head. BLOCK divides P, or PAGES is 1.
    """
    G: tl.constexpr = H // K
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tl.arange(0, ROWS)
    own = r < T * G
    t = tl.minimum(r // G, T - 1)
    at = (row.to(tl.int64) * T + t) * H + head * G + r % G
    channels = tl.arange(0, D)
    queries = tl.load(q + at[:, None] * D + channels[None, :], mask=own[:, None], other=0)
    scale = 1.4426950408889634 / tl.sqrt(D * 1.0)  # to powers of two

    first = tl.load(offset + row)
    last = tl.minimum(tl.maximum(first + T, 0), PAGES * P)  # behind the last key that any of them sees
    share = tl.cdiv(tl.cdiv(last, BLOCK), SPLITS) * BLOCK  # of the row as long as it is, not of the cache
    begin, end = split * share, tl.minimum((split + 1) * share, last)
    first_of_layer, only = number_of(layer, LAYERS) * R, tl.load(pages + row * PAGES)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        if PAGES > 1:
            page = tl.load(pages + row * PAGES + start // P)
        else:
            page = only
        place = ((first_of_layer + tl.minimum(tl.maximum(page, 0), R - 1)) * K + head) * P * D
        at_n = n - start // P * P  # in its page
        keys = tl.load(k + place + at_n[None, :] * D + channels[:, None], mask=(n < end)[None, :], other=0)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        visible = (n < end)[None, :] & (n[None, :] <= (first + t)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(most - shift)
        values = tl.load(v + place + at_n[:, None] * D + channels[None, :], mask=(n < end)[:, None], other=0)
        total = total * kept + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype.element_ty), values, acc * kept[:, None], input_precision=PRECISION)
        most = highest
    none = total == 0.0
    sums = tl.where(none, 1.0, total)
    place = at + split.to(tl.int64) * (B * T * H)
    tl.store(out + place[:, None] * D + channels[None, :], acc / sums[:, None], mask=own[:, None])
    logs = (most + tl.log2(sums)) * 0.6931471805599453
    tl.store(log_sums + place, tl.where(none, float("-inf"), logs), mask=own)
