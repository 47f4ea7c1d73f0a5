"""Products with one matrix of a stack, in the forms that XLA:CPU runs well; elsewhere a plain dot.

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
FEW_ROWS = {jnp.dtype("float32"): 4, jnp.dtype("bfloat16"): 1}  # of x: up to here the fused form beats copy and dot


def product(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """x `[N, I]` times the transpose of `stack[index]`, `[O, I]`: float32 `[N, O]`."""
    return lax.platform_dependent(x, stack, index, cpu=_on_cpu, default=_copied)


def _on_cpu(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    (N, I), O = x.shape, stack.shape[-2]
    groups, terms = _groups(N, stack.dtype)
    fusable = O % groups == 0 and I % (terms * LANE) == 0
    form = fused if fusable and FEW_ROWS[stack.dtype] >= N else _copied
    if fusable and x.dtype != stack.dtype and N <= 8:  # float32 by bfloat16: the LM head while decoding
        form = _row_by_row
    elif x.dtype == jnp.float32 and stack.size == O * I:
        return dot(x, stack.reshape(O, I))  # nothing to pick, nothing to copy
    if form is _copied and stack.dtype == jnp.float32:
        return _copied(x, stack, index)  # a dot reads and writes whole buffers as it is
    return isolated(form, index[0], x, stack, index)


def _row_by_row(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    return lax.map(lambda row: fused(row[None], stack, index)[0], x)


def _copied(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    # The fast bfloat16 product is not used for a single row.
    rows = max(2, x.shape[0]) if x.dtype == jnp.bfloat16 else x.shape[0]
    return dot(jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))), pick(stack, index))[: x.shape[0]]


def pick(stack: jax.Array, index: Index, first: int = 0, rows: int | None = None) -> jax.Array:
    """`stack[index][first : first + rows]` for a stack `[..., O, I]`."""
    O, I = stack.shape[-2:]
    rows = O if rows is None else rows
    return lax.dynamic_slice(stack, (*index, first, 0), (1,) * len(index) + (rows, I)).reshape(rows, I)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[N, I]` times the transpose of w `[O, I]`, up-cast to the dtype of x, summed in float32."""
    w = w.astype(x.dtype)
    return jnp.einsum("ni,oi->no", x, w, precision="highest", preferred_element_type=jnp.float32)


def _groups(N: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(row groups of W taken together, terms of the inner sum): measured best; with more, LLVM no longer unrolls."""
    if dtype == jnp.bfloat16:
        return 2, 16
    return (2, 8) if N == 1 else (1, 8)


def fused(x: jax.Array, stack: jax.Array, index: Index) -> jax.Array:
    """One pass over the matrix where it lies: each row as `terms` pieces of contiguous lanes, summed lane by lane.

    All products of a pass are one variadic reduction, which XLA:CPU compiles to one vectorised loop.
    """
    N, I = x.shape
    groups, terms = _groups(N, stack.dtype)
    rows, lanes = stack.shape[-2] // groups, I // terms
    # bfloat16 is picked as bits: XLA:CPU slices, like all it does with bfloat16, by way of float32.
    bits = lax.bitcast_convert_type(stack, jnp.uint16) if stack.dtype == jnp.bfloat16 else stack
    ws = [_wide(pick(bits, index, g * rows, rows)).reshape(rows, terms, lanes) for g in range(groups)]
    xs = x.astype(jnp.float32).reshape(N, 1, terms, lanes)
    products = tuple(w * xs[n] for n in range(N) for w in ws)
    zeros = (jnp.float32(0),) * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (1,))
    return jnp.stack([jnp.sum(s, axis=-1) for s in sums]).reshape(N, groups * rows)


def _wide(w: jax.Array) -> jax.Array:
    """The bits of a bfloat16 as float32."""
    if w.dtype != jnp.uint16:
        return w
    return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
