"""The experts' products of few bfloat16 rows with int4 weights on Hopper, in Triton: both, from tokens to assignments.

What bounds them is not memory but the instructions that make numbers of the weights, so few that a weight takes two:

- A thread reads 16 bytes of a row of weights at once, 32 numbers. Operands of tensor cores lie among threads in another
  way; the in-channels of a group may come in any order, though, if those of x do, too, and they come in that in which
  each thread multiplies what it has read (`arranged`).
- A number n is put into the mantissa of 128 + n, by two instructions for each two. What is too much, 136 Σx for n - 8,
  is subtracted from the sum over a group, for which the sums of x come with it. Products and these sums are exact or
  float32, so that this costs some five of the 24 bits that a sum has.
- Scales and sums of x are read a group ahead: the compiler does so for operands of products alone.

h is written in the order of the second product, with its sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from m1jax.kernels.experts.kernels import tile_among_few
from m1jax.kernels.experts.quantized import Quantized
from m1jax.kernels.gpu import launch
from m1jax.kernels.gpu.kernels import number_of
from m1jax.kernels.gpu.tiles import Tiles

SUMMED = 64  # channels of which the sums are known, or those of a group where it has fewer

# Eight halves of bytes to 128 + n in bfloat16, as PTX: the lower halves of bytes 0 and 2, 1 and 3, then the higher.
_INT4 = tl.constexpr("""{
.reg .b32 w, a, b, c, d;
lop3.b32 a, $8, 0x000f000f, 0x43004300, 0xEA;
shr.u32 w, $8, 8;
lop3.b32 b, w, 0x000f000f, 0x43004300, 0xEA;
shr.u32 w, $8, 4;
lop3.b32 c, w, 0x000f000f, 0x43004300, 0xEA;
shr.u32 w, $8, 12;
lop3.b32 d, w, 0x000f000f, 0x43004300, 0xEA;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")


class Arranged(NamedTuple):
    """Rows in the order in which channels are multiplied, bfloat16 `[n, I]`, and their sums, float32 `[n, I / W]`, of W
    channels: SUMMED, or those of a group if it has fewer.
    """

    x: jax.Array
    sums: jax.Array


def experts(
    x: jax.Array, gate_up: Quantized, down: Quantized, layer: jax.Array, chosen: jax.Array, *, interpreted: bool = False
) -> jax.Array:
    """W2 (silu(W1 x) ⊙ W3 x) of each assignment, float32 `[N·k, M]`, anything for none.

    Arguments as in `reference.experts`, but layer int32 `[1]`.
    """
    n, E = chosen.size, gate_up.shape[1]
    # 16 rows: of 8 Triton 3.6 makes no instructions of warp groups. With too few programs for the device they share the
    # sums.
    first = Tiles(16, 64, gate_up.group, 4, 4)
    second = Tiles(16, 128, down.group, 4, 4, 4 if n <= E // 2 else 1)
    h = product(first, arranged(x, gate_up.group), gate_up, layer, chosen, interpreted, down)
    (y,) = product(second, Arranged(*h), down, layer, chosen, interpreted)
    return jnp.sum(y, axis=0)


def summed(group: int) -> int:
    """W, of how many channels the sums are, where groups have so many."""
    return min(group, SUMMED)


def arranged(x: jax.Array, group: int) -> Arranged:
    """Rows `[n, I]` as the products take them."""
    n, I = x.shape
    parts = x.reshape(n, I // group, 2, 4, group // 32, 2, 2)  # halves, threads, words, bytes
    sums = jnp.sum(x.reshape(n, -1, summed(group)), axis=-1, dtype=jnp.float32)
    return Arranged(parts.transpose(0, 1, 4, 2, 6, 3, 5).reshape(n, I), sums)


def product(
    tiles: Tiles,
    x: Arranged,
    weights: Quantized,
    layer: jax.Array,
    chosen: jax.Array,
    interpreted: bool,
    then: Quantized | None = None,
) -> list[jax.Array]:
    """Float32 `[split, N·k, O]` of rows that are assignments; of tokens, with the weights of the product that comes
    `then`, silu(W1 x) ⊙ W3 x as that takes it.
    """
    n, (L, E), O, I = chosen.size, weights.shape[:2], weights.shape[-2], weights.shape[-1]
    group = then.group if then else 0
    constants: dict[str, object] = {"GATED": bool(then), "OUT_GROUP": group, "OUT_WIDTH": summed(group)}
    if then:
        sums = jax.ShapeDtypeStruct((n, O // summed(group)), jnp.float32)
        out = [jax.ShapeDtypeStruct((n, O), jnp.bfloat16), sums]
    else:
        out = [jax.ShapeDtypeStruct((tiles.split, n, O), jnp.float32)]
        constants["out_sums"] = None
    return launch(
        forward, x.x, x.sums, weights.values, weights.scales, layer, chosen.reshape(-1), out=out,
        grid=(n * -(-O // tiles.out), tiles.split), warps=tiles.warps, stages=tiles.stages, interpreted=interpreted,
        **constants, O=O, I=I, L=L, E=E, k=chosen.shape[1], N=n, POWER=1 << (n - 1).bit_length(), GROUP=tiles.inner,
        WIDTH=summed(tiles.inner), SPLIT=tiles.split, R=tiles.rows, BO=tiles.out, PTX=not interpreted,
    )  # fmt: skip


@triton.jit
def number(words, SHIFT: tl.constexpr):
    """128 + n of the four bits of words from SHIFT on."""
    return (((words >> SHIFT) & 15) + 128).to(tl.bfloat16)


@triton.jit
def numbers(pointer, o, g, I: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """128 + n of the group g of rows o, `[o, GROUP]`, in the order of `arranged`."""
    words = tl.load(pointer + o[:, None] * (I // 8) + (g * (GROUP // 8) + tl.arange(0, GROUP // 8))[None, :])
    if PTX:
        a, b, c, d, e, f, h, i = tl.inline_asm_elementwise(
            _INT4, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], (tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    else:
        a, b, c, d = number(words, 0), number(words, 16), number(words, 8), number(words, 24)
        e, f, h, i = number(words, 4), number(words, 20), number(words, 12), number(words, 28)
    even = tl.join(tl.join(a, e), tl.join(c, h))
    odd = tl.join(tl.join(b, f), tl.join(d, i))
    both = tl.reshape(tl.join(even, odd), (o.shape[0], 4, GROUP // 32, 2, 2, 2))
    return tl.reshape(tl.permute(both, (0, 2, 3, 4, 1, 5)), (o.shape[0], GROUP))


@triton.jit
def arranged_place(channel, GROUP: tl.constexpr):
    """Where `arranged` puts channels."""
    half = channel % GROUP // (GROUP // 2)
    byte = channel % (GROUP // 2)
    thread = byte // (GROUP // 8)
    word = byte // 4 % (GROUP // 32)
    return channel // GROUP * GROUP + word * 32 + half * 16 + byte % 2 * 8 + thread * 2 + byte // 2 % 2


@triton.jit
def excess(sums, rows, g, I: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """What the products of 128 + n are too much by for n - 8, `[rows]`: 136 Σx of the group g."""
    found = sums + rows.to(tl.int64) * (I // WIDTH) + g * (GROUP // WIDTH)
    total = tl.load(found)
    if GROUP > WIDTH:
        total += tl.load(found + 1)
    return 136 * total


@triton.jit
def forward(
    x,
    sums,
    values,
    scales,
    layer,
    chosen,
    out,
    out_sums,
    O: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    k: tl.constexpr,
    N: tl.constexpr,
    POWER: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
    PTX: tl.constexpr,
):
    """What `product` says."""
    BLOCKS: tl.constexpr = (O + BO - 1) // BO
    GROUPS: tl.constexpr = I // GROUP
    PART: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    e, block, a, valid, count = tile_among_few(chosen, tl.program_id(0), BLOCKS, R, E, N, POWER)
    if count == 0:
        return
    rows = a // k if GATED else a
    channel = block * BO + tl.arange(0, BO)
    o = tl.minimum(channel, O - 1)  # rows past the end are computed in vain
    matrix = (number_of(layer, L) * E + e) * ((2 if GATED else 1) * O)
    values = values.to(tl.pointer_type(tl.int32)) + matrix * (I // 8)
    scales += matrix * GROUPS
    split = tl.program_id(1)
    begin = split * PART
    first = tl.zeros((BO, R), tl.float32)
    second = tl.zeros((BO, R), tl.float32)
    ahead = tl.minimum(begin, GROUPS - 1)
    much = excess(sums, rows, ahead, I, GROUP, WIDTH)
    scale = tl.load(scales + o * GROUPS + ahead)
    if GATED:
        up_scale = tl.load(scales + (o + O) * GROUPS + ahead)
    for g in range(begin, tl.minimum(begin + PART, GROUPS)):
        ahead = tl.minimum(g + 1, GROUPS - 1)
        next_much = excess(sums, rows, ahead, I, GROUP, WIDTH)
        next_scale = tl.load(scales + o * GROUPS + ahead)
        if GATED:
            next_up_scale = tl.load(scales + (o + O) * GROUPS + ahead)
        columns = tl.load(x + rows[None, :].to(tl.int64) * I + (g * GROUP + tl.arange(0, GROUP))[:, None])
        part = tl.dot(numbers(values, o, g, I, GROUP, PTX), columns)
        first += (part - much[None, :]) * scale[:, None]
        if GATED:
            part = tl.dot(numbers(values, o + O, g, I, GROUP, PTX), columns)
            second += (part - much[None, :]) * up_scale[:, None]
            up_scale = next_up_scale
        much = next_much
        scale = next_scale
    place = a[None, :].to(tl.int64)
    inside = (channel < O)[:, None] & valid[None, :]
    if GATED:
        h = (first * tl.sigmoid(first) * second).to(out.dtype.element_ty)
        tl.store(out + place * O + arranged_place(channel, OUT_GROUP)[:, None], h, mask=inside)
        SUMS: tl.constexpr = BO // OUT_WIDTH
        total = tl.sum(tl.reshape(h.to(tl.float32), (SUMS, OUT_WIDTH, R)), axis=1)
        which = block * SUMS + tl.arange(0, SUMS)
        there = (which < O // OUT_WIDTH)[:, None] & valid[None, :]
        tl.store(out_sums + place * (O // OUT_WIDTH) + which[:, None], total, mask=there)
    else:
        tl.store(out + (split.to(tl.int64) * N + place) * O + channel[:, None], first, mask=inside)
