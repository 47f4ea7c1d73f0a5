"""Products with one matrix of a stack, in the forms that XLA:CPU runs well; elsewhere plain dots.

Two habits of XLA:CPU shape this file. A dot wants its matrix in a buffer of its own, so that a matrix picked from a
stack is first copied, which costs more than the product itself while the rows are few. And it converts bfloat16
matrices to float32 ahead of a loop, all of them, unless the product stands in a branch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.isolate import isolated

Index = tuple[jax.Array | int, ...]

LANE = 16  # floats of the widest vector register
FEW_ROWS = 16  # of x: up to here the matrix is the left operand of a dot, which then is not repacked
MANY_ROWS = 1024  # of x: from here on copying a matrix costs nothing beside the product
AT_ONCE = 128  # of x: up to here its three parts are one product, whose output has three times the rows
TILE = 1 << 19  # elements of a matrix picked and multiplied at a time: the copy stays in a core's cache


def product(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """x `[N, I]` times the transpose of `stack[index]`, `[O, I]`: float32 `[N, O]`."""
    return lax.platform_dependent(x, stack, index, cpu=_on_cpu, default=elsewhere)


def elsewhere(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """`product` where it is not for a CPU."""
    if x.dtype == stack.dtype:
        return dot(x, pick(stack, index))
    # The LM head: converted, the matrix would be written and read as float32, and multiplied without tensor cores.
    if x.shape[0] <= AT_ONCE:
        return _in_parts(x, stack, index)
    w = pick(stack, index)
    high, middle, low = (dot(part.astype(jnp.bfloat16), w) for part in _parts(x))
    return high + (middle + low)


def _on_cpu(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    (N, I), O = x.shape, stack.shape[-2]
    if (N, stack.dtype) in GROUPS_AND_TERMS:
        groups, terms = GROUPS_AND_TERMS[N, stack.dtype]
        if O % groups == 0 and I % (terms * LANE) == 0:
            return isolated(fused, index[0], x, stack, index)
    if x.dtype == jnp.float32 and stack.dtype == jnp.bfloat16 and N <= FEW_ROWS:  # the LM head while decoding
        return isolated(_in_parts, index[0], x, stack, index)
    if stack.dtype == jnp.bfloat16:
        return isolated(_copied, index[0], x, stack, index)
    if stack.size == O * I:
        return dot(x, stack.reshape(O, I))  # nothing to pick, nothing to copy
    tiles = _divisor(O, max(1, O * I // TILE))
    return _tiled(x, stack, index, O // tiles) if FEW_ROWS < N < MANY_ROWS and tiles > 1 else _copied(x, stack, index)


def _in_parts(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """Exact float32 x by bfloat16, the matrix read once."""
    out = dot(jnp.concatenate(_parts(x)).astype(jnp.bfloat16), pick(stack, index))
    high, middle, low = jnp.split(out, 3)
    return high + (middle + low)


def _parts(x: jax.Array) -> list[jax.Array]:
    """The 24 bits of float32 numbers as three bfloat16 of 8 bits, whose products with bfloat16 float32 holds."""
    parts = []
    for _ in range(3):
        parts.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))  # a cast would be optimised away
        x = x - parts[-1]
    return parts


def _copied(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    # The fast bfloat16 product is not used for a single row.
    rows = max(2, x.shape[0]) if x.dtype == jnp.bfloat16 else x.shape[0]
    return dot(jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))), pick(stack, index))[: x.shape[0]]


def _tiled(x: jax.Array, stack: jax.Array, index: Index, rows: int) -> jax.Array:
    def tile(out: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        return lax.dynamic_update_slice(out, dot(x, pick(stack, index, first, rows)), (0, first)), None

    O = stack.shape[-2]
    return lax.scan(tile, jnp.zeros_like(x, jnp.float32, (x.shape[0], O)), jnp.arange(0, O, rows))[0]


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of n that is at least `least`."""
    return next(d for d in range(least, n + 1) if n % d == 0)


def pick(stack: jax.Array, index: Index, first: jax.Array | int = 0, rows: int | None = None) -> jax.Array:
    """`stack[index][first : first + rows]` for a stack `[..., O, I]`."""
    O, I = stack.shape[-2:]
    rows = O if rows is None else rows
    start = tuple(map(jnp.int32, (*index, first, 0)))  # all of one kind with 64-bit integers, too
    return lax.dynamic_slice(stack, start, (1,) * len(index) + (rows, I)).reshape(rows, I)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[N, I]` times the transpose of w `[O, I]`, up-cast to the dtype of x, summed in float32."""
    w = w.astype(x.dtype)
    if x.shape[0] <= FEW_ROWS and x.dtype == jnp.float32:
        return jnp.einsum("oi,ni->on", w, x, precision="highest", preferred_element_type=jnp.float32).T
    return jnp.einsum("ni,oi->no", x, w, precision="highest", preferred_element_type=jnp.float32)


F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
# Of rows of x and dtype: row groups of W taken together, terms of the inner sum. Measured best; LLVM unrolls no more
# than some 32 products, and with more rows copying W is as fast.
GROUPS_AND_TERMS = {
    (1, F32): (2, 16), (2, F32): (1, 16), (3, F32): (1, 16), (4, F32): (1, 8),
    (1, BF16): (4, 8), (2, BF16): (2, 8), (3, BF16): (1, 8),
}  # fmt: skip


def fused(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """A few rows `[N, I]`, one pass over the matrix where it lies: its rows in pieces of `terms` vector registers.

    All products of the pass are one variadic reduction, which XLA:CPU compiles to one vectorised loop. Pieces are
    contiguous: the same sums with registers that lie apart read memory at half the speed.
    """
    groups, terms = GROUPS_AND_TERMS[x.shape[0], stack.dtype]
    rows, I = stack.shape[-2] // groups, x.shape[1]
    # bfloat16 is picked as bits: XLA:CPU slices, like all it does with bfloat16, by way of float32.
    bits = lax.bitcast_convert_type(stack, jnp.uint16) if stack.dtype == jnp.bfloat16 else stack
    pieces = (I // (terms * LANE), terms, LANE)
    wide = x.astype(jnp.float32).reshape(-1, 1, *pieces)
    parts = [_wide(pick(bits, index, g * rows, rows)).reshape(rows, *pieces) for g in range(groups)]
    products = tuple(row * part for row in wide for part in parts)
    zeros = (jnp.float32(0),) * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (2,))
    return jnp.concatenate([jnp.sum(s, axis=(1, 2)) for s in sums]).reshape(len(wide), -1)


def _wide(w: jax.Array) -> jax.Array:
    """The bits of a bfloat16 as float32."""
    if w.dtype != jnp.uint16:
        return w
    return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
