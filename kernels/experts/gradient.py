"""The gradient of the experts, block by block as in `xla.blocked`; what the blocks computed is computed again.

For a row x of expert e with share p, h = silu(w1 x) ⊙ (w3 x) and g the gradient of its token's output:

    dp = h·(g w2)      dh = p (g w2)      dx = dw1-part · w1 + dw3-part · w3      dw2 += p gᵀ h
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.experts import xla

Index = jax.Array | int
Residuals = tuple[jax.Array, jax.Array, jax.Array, Index, jax.Array, jax.Array]


def blocked(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: Index,
    chosen: jax.Array,
    weights: jax.Array,
    rows: int,
) -> jax.Array:
    """`xla.blocked` with a gradient to `x`, `gate_up`, `down` and `weights`."""

    @jax.custom_vjp
    def run(
        x: jax.Array, gate_up: jax.Array, down: jax.Array, layer: Index, chosen: jax.Array, weights: jax.Array
    ) -> jax.Array:
        return xla.blocked(x, gate_up, down, layer, chosen, weights, rows)

    def forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return run(*args), args

    def backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array | None, ...]:
        return _backward(*residuals, g, rows)

    run.defvjp(forward, backward)
    return run(x, gate_up, down, layer, chosen, weights)


def _backward(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: Index,
    chosen: jax.Array,
    weights: jax.Array,
    g: jax.Array,
    rows: int,
) -> tuple[jax.Array | None, ...]:
    N, k = chosen.shape
    _, E, _, F, M = gate_up.shape
    f32, dtype = jnp.float32, x.dtype
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # [N·k]
    experts, firsts, counts = xla._blocks(flat, E, rows)
    tokens = jnp.pad(order // k, (0, rows))
    share = jnp.pad(weights.reshape(-1)[order], (0, rows))
    # This layer's weights alone: what the loop takes from the whole stack would be copied again and again.
    w13 = lax.dynamic_index_in_dim(gate_up, layer, keepdims=False).reshape(E, 2 * F, M)
    w2 = lax.dynamic_index_in_dim(down, layer, keepdims=False)

    def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a.astype(dtype), b, precision="highest", preferred_element_type=f32)

    def block(size: int, e: jax.Array, first: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        at = lax.dynamic_slice_in_dim(tokens, first, size)
        inside = jnp.arange(size) < count  # the rows beyond belong to the next expert
        p = jnp.where(inside, lax.dynamic_slice_in_dim(share, first, size), 0.0)[:, None]
        x_block, g_block, w13_e, w2_e = x[at], g[at], w13[e], w2[e]
        gate, up = jnp.split(dot("nm,fm->nf", x_block, w13_e), 2, axis=1)
        active, undo = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        h = active.astype(dtype)
        through = dot("nm,mf->nf", g_block, w2_e)  # g w2
        d_share = jnp.where(inside, jnp.sum(h.astype(f32) * through, axis=1), 0.0)
        d_13 = jnp.concatenate(undo(p * through), axis=1).astype(dtype)
        d_x = dot("nf,fm->nm", d_13, w13_e)
        d_w13, d_w2 = dot("nf,nm->fm", d_13, x_block), dot("nm,nf->mf", p * g_block, h)
        return jnp.pad(d_x, ((0, rows - size), (0, 0))), jnp.pad(d_share, (0, rows - size)), d_w13, d_w2

    def nothing(*_: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.zeros((rows, M), f32), jnp.zeros(rows, f32), jnp.zeros((2 * F, M), f32), jnp.zeros((M, F), f32)

    sizes = sorted({-(-rows // 2), rows})
    branches = [nothing, *(functools.partial(block, size) for size in sizes)]

    def body(sums: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        e, first, count = inputs
        d_x, d_share, d_w13, d_w2 = sums
        smallest = jnp.searchsorted(jnp.asarray((0, *sizes)), count)
        # The sums stay outside the branches, which would copy them whole.
        rows_x, rows_share, more_13, more_2 = lax.switch(smallest, branches, e, first, count)
        d_x = lax.dynamic_update_slice(d_x, rows_x, (first, 0))
        d_share = lax.dynamic_update_slice(d_share, rows_share, (first,))
        return (d_x, d_share, d_w13.at[e].add(more_13), d_w2.at[e].add(more_2)), None

    zeros = (
        jnp.zeros((N * k + rows, M), f32),
        jnp.zeros(N * k + rows, f32),
        jnp.zeros((E, 2 * F, M), f32),
        jnp.zeros((E, M, F), f32),
    )
    (d_x, d_share, d_w13, d_w2), _ = lax.scan(body, zeros, (experts, firsts, counts))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype), unique_indices=True)
    d_x = jnp.sum(jnp.where((flat < E)[:, None], d_x[place], 0.0).reshape(N, k, M), axis=1)
    d_share = jnp.where(flat < E, d_share[place], 0.0).reshape(N, k)
    d_gate_up, d_down = d_w13.reshape(E, 2, F, M), d_w2
    return d_x.astype(dtype), _in_stack(d_gate_up, gate_up, layer), _in_stack(d_down, down, layer), None, None, d_share


def _in_stack(gradient: jax.Array, stack: jax.Array, layer: Index) -> jax.Array:
    """The gradient of a stack, of which one layer was used."""
    gradient = gradient[None].astype(stack.dtype)
    if stack.shape[0] == 1:
        return gradient
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(stack), gradient, layer, 0)
