"""The gradient of the experts, block by block as in `xla.blocked`; what the blocks computed is computed again.

For a row x of expert e with share p, h = silu(w1 x) ⊙ (w3 x) and g the gradient of its token's output:

    dp = h·(g w2)      dh = p (g w2)      dx = dw1-part · w1 + dw3-part · w3      dw2 += p gᵀ h

Quantised weights have no gradient; those of a block are floats while it is computed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.experts import xla
from m1jax.kernels.experts.order import by_bucket
from m1jax.kernels.experts.quantized import Quantized, Weights, dequantize, join_rows, layer_of

Index = jax.Array | int
Residuals = tuple[jax.Array, Weights, Weights, Index, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def blocked(
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: Index,
    chosen: jax.Array,
    weights: jax.Array,
    rows: int,
) -> jax.Array:
    """`xla.blocked` with a gradient to `x`, `weights`, and to `gate_up` and `down` where they are floats."""
    return xla.blocked(x, gate_up, down, layer, chosen, weights, rows)


class Sorted(NamedTuple):
    """The rows of all experts, one expert after the other, and the blocks that they are computed in."""

    blocks: tuple[jax.Array, jax.Array, jax.Array]  # expert, first row, rows
    tokens: jax.Array  # [N·k + R]
    share: jax.Array  # [N·k + R]
    place: jax.Array  # [N, k], where the rows of a token are
    somebody: jax.Array  # bool [N, k]


def _sort(chosen: jax.Array, weights: jax.Array, experts: int, rows: int) -> Sorted:
    flat, k = chosen.reshape(-1), chosen.shape[1]
    order, place, counts = by_bucket(flat, experts)
    return Sorted(
        xla.blocks_of(counts, flat.shape[0], rows),
        jnp.pad(order // k, (0, rows)),
        jnp.pad(weights.reshape(-1)[order], (0, rows)),
        place.reshape(chosen.shape),
        chosen < experts,
    )


def _this(gate_up: Weights, down: Weights, layer: Index) -> tuple[Weights, Weights]:
    """This layer's weights alone: what a loop takes from the whole stack would be copied again and again."""
    return join_rows(layer_of(gate_up, layer)), layer_of(down, layer)


def _of_expert(w: Weights, e: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return w[e] if isinstance(w, jax.Array) else dequantize(layer_of(w, e)).astype(dtype)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32, `a` rounded to the dtype of b."""
    return jnp.einsum(spec, a.astype(b.dtype), b, precision="highest", preferred_element_type=jnp.float32)


def _switch(block: Any, nothing: Any, rows: int, inputs: tuple[jax.Array, ...]) -> Any:
    """The smallest compiled size that holds the rows; fewer sizes than in inference, to compile fast."""
    sizes = sorted({-(-rows // 2), rows})
    smallest = jnp.searchsorted(jnp.asarray((0, *sizes)), inputs[2])
    return lax.switch(smallest, [nothing, *(functools.partial(block, size) for size in sizes)], *inputs)


def _forward(
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: Index,
    chosen: jax.Array,
    weights: jax.Array,
    rows: int,
) -> tuple[jax.Array, Residuals]:
    if isinstance(gate_up, Quantized) or isinstance(down, Quantized):
        return xla.blocked(x, gate_up, down, layer, chosen, weights, rows), (x, gate_up, down, layer, chosen, weights)
    (N, k), M = chosen.shape, x.shape[1]
    sorted_ = _sort(chosen, weights, gate_up.shape[1], rows)
    w13, w2 = _this(gate_up, down, layer)

    def block(size: int, e: jax.Array, first: jax.Array, _: jax.Array) -> jax.Array:
        rows_x = x[lax.dynamic_slice_in_dim(sorted_.tokens, first, size)]
        gate, up = jnp.split(_dot("nm,fm->nf", rows_x, w13[e]), 2, axis=1)
        y = _dot("nf,mf->nm", jax.nn.silu(gate) * up, w2[e])
        y *= lax.dynamic_slice_in_dim(sorted_.share, first, size)[:, None]
        return jnp.pad(y, ((0, rows - size), (0, 0)))

    def body(out: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        y = _switch(block, lambda *_: jnp.zeros_like(x, jnp.float32, (rows, M)), rows, inputs)
        return lax.dynamic_update_slice(out, y, (inputs[1], 0)), None

    out, _ = lax.scan(body, jnp.zeros_like(x, jnp.float32, (N * k + rows, M)), sorted_.blocks)
    y = jnp.sum(jnp.where(sorted_.somebody[..., None], out[sorted_.place], 0.0), axis=1)
    return y, (x, gate_up, down, layer, chosen, weights)


def _backward(rows: int, residuals: Residuals, g: jax.Array) -> tuple[jax.Array | None, ...]:
    x, gate_up, down, layer, chosen, weights = residuals
    (N, k), f32, dtype = chosen.shape, jnp.float32, x.dtype
    _, E, _, F, M = gate_up.shape
    sorted_ = _sort(chosen, weights, E, rows)
    w13, w2 = _this(gate_up, down, layer)
    trained = tuple(not isinstance(w, Quantized) for w in (gate_up, down))
    of_expert = tuple(shape if has else () for shape, has in zip(((2 * F, M), (M, F)), trained, strict=True))

    def block(size: int, e: jax.Array, first: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        at = lax.dynamic_slice_in_dim(sorted_.tokens, first, size)
        inside = jnp.arange(size) < count  # the rows beyond belong to the next expert
        p = jnp.where(inside, lax.dynamic_slice_in_dim(sorted_.share, first, size), 0.0)[:, None]
        x_block, g_block, w13_e, w2_e = x[at], g[at], _of_expert(w13, e, dtype), _of_expert(w2, e, dtype)
        gate, up = jnp.split(_dot("nm,fm->nf", x_block, w13_e), 2, axis=1)
        active, undo = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        h = active.astype(dtype)
        through = _dot("nm,mf->nf", g_block, w2_e)  # g w2
        d_share = jnp.where(inside, jnp.sum(h.astype(f32) * through, axis=1), 0.0)
        d_13 = jnp.concatenate(undo(p * through), axis=1).astype(dtype)
        d_x = jnp.pad(_dot("nf,fm->nm", d_13, w13_e), ((0, rows - size), (0, 0)))
        d_w13 = _dot("nf,nm->fm", d_13, x_block) if trained[0] else jnp.zeros_like(x, f32, ())
        d_w2 = _dot("nm,nf->mf", p * g_block, h) if trained[1] else jnp.zeros_like(x, f32, ())
        return d_x, jnp.pad(d_share, (0, rows - size)), d_w13, d_w2

    def nothing(*_: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros_like(x, f32, shape) for shape in ((rows, M), (rows,), *of_expert))

    def body(sums: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        e, first, _ = inputs
        d_x, d_share, d_w13, d_w2 = sums
        # The sums stay outside the branches, which would copy them whole.
        rows_x, rows_share, more_13, more_2 = _switch(block, nothing, rows, inputs)
        d_x = lax.dynamic_update_slice(d_x, rows_x, (first, 0))
        d_share = lax.dynamic_update_slice(d_share, rows_share, (first,))
        return (d_x, d_share, d_w13.at[e].add(more_13), d_w2.at[e].add(more_2)), None

    shapes = ((N * k + rows, M), (N * k + rows,), *((E, *shape) for shape in of_expert))
    sums, _ = lax.scan(body, tuple(jnp.zeros_like(x, f32, shape) for shape in shapes), sorted_.blocks)
    d_x, d_share, d_w13, d_w2 = sums
    d_x = jnp.sum(jnp.where(sorted_.somebody[..., None], d_x[sorted_.place], 0.0), axis=1)
    d_share = jnp.where(sorted_.somebody, d_share[sorted_.place], 0.0)
    d_gate_up = _in_stack(d_w13.reshape(E, 2, F, M), gate_up, layer) if trained[0] else None
    d_down = _in_stack(d_w2, down, layer) if trained[1] else None
    return d_x.astype(dtype), d_gate_up, d_down, None, None, d_share


blocked.defvjp(_forward, _backward)


def _in_stack(gradient: jax.Array, stack: jax.Array, layer: Index) -> jax.Array:
    """The gradient of a stack, of which one layer was used."""
    gradient = gradient[None].astype(stack.dtype)
    if stack.shape[0] == 1:
        return gradient
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(stack), gradient, layer, 0)
