"""Experts on Hopper: how the Triton kernels of `kernels.py` and `single.py` are put together, the rules for gradients.

Two products: h = silu(W1 x) ⊙ W3 x for each assignment of a token to an expert, in the dtype of x, then W2 h in
float32; the shares and the sum over a token's experts are left to XLA, which fuses them. Rows are picked and placed by
the kernels, no sorted copies are made. All sums are float32; in bfloat16 h is rounded as in every other form.

`mosaic.py` and `int4.py` have both products in forms of their own, without gradients: of many rows with weights in
bfloat16, and of few with int4 ones.
"""

import dataclasses
import functools
import importlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.experts.order import by_bucket, table_of_tiles
from m1jax.kernels.experts.quantized import Quantized, Weights
from m1jax.kernels.gpu import launch
from m1jax.kernels.gpu.tiles import Tiles
from m1jax.kernels.rounding import mapped

FEW = 256  # assignments, up to which each program finds its rows on its own
CHUNK = 32_768  # tokens computed at once: h of more would fill the memory
SPAN = 4  # tiles of one expert that share a block of weights through the cache
INT4_GROUPS = (32, 64, 128)  # in-channels, of which a step multiplies one group
MOSAIC_CHANNELS = 64  # of which M and F are multiples in Mosaic's form


class Routing(NamedTuple):
    """Where the rows of each expert are; `order`, `table` and `bounds` as the kernels want them."""

    order: jax.Array  # int32 [N·k]: assignments sorted by expert; `chosen` itself if few
    table: jax.Array  # int32 [tiles, 5]
    bounds: jax.Array  # int32 [E + 1]


@dataclasses.dataclass(frozen=True)
class Form:
    """How to run: tiles of the two forward products and of the gradients, whether in the interpreter, and the module
    that has both forward products where no gradient is wanted, if it is another than `kernels`.
    """

    gate_up: Tiles
    down: Tiles
    rows_gradient: Tiles
    weights_gradient: Tiles
    interpreted: bool = False
    both: Literal["mosaic", "int4"] | None = None


def bits_of(weights: Weights) -> int:
    """Bits of a quantised weight; 0 for float weights."""
    return int(weights.kind[3:]) if isinstance(weights, Quantized) else 0


def default_form(
    assignments: int, E: int, dtype: Any, bits: tuple[int, int], interpreted: bool = False, mosaic: bool = False
) -> Form:
    """Tiles for a number of rows: wide where products are bound by arithmetic, narrow where by reading weights.

    `bits` are those of gate_up and of down, as of `bits_of`.
    """
    each = assignments / E
    if dtype == jnp.float32:
        exact = Tiles(16, 64, 32, 4, 1)
        # There a step takes whole int4 groups: of more out channels they would be spilled.
        rows_gradient = dataclasses.replace(exact, out=16) if 4 in bits else exact
        return Form(exact, exact, rows_gradient, exact, interpreted)
    if bits == (8, 8) and assignments <= E // 2:
        gate_up, down = (Tiles(1, 16, 512, warps, 1) for warps in (4, 2))  # a warp reads 512 bytes of a row at once
    elif assignments <= FEW or each <= 12:
        gate_up = Tiles(16, 64, 128, 4, 3 if bits[0] else 4)
        # With too few programs for the device they share the sums.
        down = Tiles(16, 128, 128, 4, 3) if assignments > E // 2 else Tiles(16, 128, 128, 8, 3, 2)
    elif each <= 96:
        gate_up, down = Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3)
    else:
        gate_up = {0: Tiles(128, 128, 64, 8, 4), 8: Tiles(128, 64, 64, 4, 4), 4: Tiles(64, 128, 64, 8, 3)}[bits[0]]
        down = {0: Tiles(128, 256, 64, 8, 4), 8: Tiles(256, 128, 64, 8, 3), 4: Tiles(128, 128, 64, 8, 4)}[bits[1]]
    rows_gradient = Tiles(128, 64, 128, 8, 3) if each > 96 else Tiles(64, 64, 128, 4, 3)
    both = "mosaic" if mosaic else "int4" if bits == (4, 4) and assignments <= FEW else None
    return Form(gate_up, down, rows_gradient, Tiles(64, 128, 128, 8, 3), interpreted, both)


def refusal(gate_up: Weights, down: Weights) -> str | None:
    """Why these kernels do not take such weights; None if they do."""
    for name, weights in (("gate_up", gate_up), ("down", down)):
        if isinstance(weights, Quantized) and weights.kind == "int4" and weights.group not in INT4_GROUPS:
            return f"{name} has int4 groups of {weights.group} in-channels, the kernels need 32, 64 or 128"
    return None


def refusal_of_mosaic(gate_up: Weights, down: Weights) -> str | None:
    """Why Mosaic's form does not take such weights, whatever the device; None if it does."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    for name, weights in (("gate_up", gate_up), ("down", down)):
        if isinstance(weights, Quantized) or weights.dtype != jnp.bfloat16:
            kind = weights.kind if isinstance(weights, Quantized) else weights.dtype
            return f"it takes weights in bfloat16, {name} is {kind}"
    F, M = gate_up.shape[-2:]
    if F % MOSAIC_CHANNELS or M % MOSAIC_CHANNELS:
        return f"it takes F and M that are multiples of {MOSAIC_CHANNELS}, got {F} and {M}"
    return None


def experts(
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array | int,
    chosen: jax.Array,
    weights: jax.Array,
    form: Form | None = None,
    interpreted: bool = False,
    mosaic: bool = False,
) -> jax.Array:
    """Arguments as in `reference.experts`; `form` None chooses by shape, and as the last two say."""
    N, k = chosen.shape
    if N > CHUNK and form is None:
        one = functools.partial(experts, interpreted=interpreted, mosaic=mosaic)
        return _in_chunks(one, x, gate_up, down, layer, chosen, weights)
    E = gate_up.shape[1]
    if form is None:
        form = default_form(N * k, E, x.dtype, (bits_of(gate_up), bits_of(down)), interpreted, mosaic)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    both = _both_at_once if form.both else _both
    y: Any = both(form, x, gate_up, down, layer, chosen)
    y = jnp.where(chosen[..., None] < E, y.reshape(N, k, -1), 0.0)  # no kernel writes padding
    return jnp.sum(y * weights[..., None], axis=1)


def _both(form: Form, x: jax.Array, gate_up: Weights, down: Weights, layer: jax.Array, chosen: jax.Array) -> jax.Array:
    """Both products of each assignment, float32 `[N·k, M]`; anything for padding."""
    h: Any = product(form, True, chosen.shape[1], x, gate_up, layer, chosen)
    y: Any = product(form, False, chosen.shape[1], h, down, layer, chosen)  # [split, N·k, M]
    return jnp.sum(y, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _both_at_once(
    form: Form, x: jax.Array, gate_up: Weights, down: Weights, layer: jax.Array, chosen: jax.Array
) -> jax.Array:
    module = importlib.import_module(f"m1jax.kernels.experts.{form.both}")
    return module.experts(x, gate_up, down, layer, chosen, interpreted=form.interpreted)


def _both_forward(form: Form, *arguments: jax.Array) -> tuple[jax.Array, Any]:
    return jax.vjp(functools.partial(_both, form), *arguments)


_both_at_once.defvjp(_both_forward, lambda _, undo, d: undo(d))


def _in_chunks(
    of_chunk: Any,
    x: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array | int,
    chosen: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    N, E = x.shape[0], gate_up.shape[1]
    chunks = -(-N // CHUNK)

    def cut(a: jax.Array, padding: float = 0) -> jax.Array:
        a = jnp.pad(a, ((0, chunks * CHUNK - N), (0, 0)), constant_values=padding)
        return a.reshape(chunks, CHUNK, -1)

    def one(stacks: tuple[Weights, Weights], part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, chosen, weights = part
        return of_chunk(x, *stacks, layer, chosen, weights)

    return mapped(one, (gate_up, down), (cut(x), cut(chosen, E), cut(weights))).reshape(chunks * CHUNK, -1)[:N]


def route(chosen: jax.Array, E: int, R: int) -> Routing:
    """Sorts the assignments by expert and cuts each expert's into tiles of R; experts equal to E are left out."""
    flat = chosen.reshape(-1)
    n = flat.shape[0]
    order, _, counts = by_bucket(flat, E)
    bounds = jnp.pad(jnp.cumsum(counts), (1, 0))
    return Routing(order, table_of_tiles(counts, bounds[:-1], R, min(n, n // R + E), SPAN), bounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(
    form: Form, gated: bool, k: int, x: jax.Array, weights: Weights, layer: jax.Array, chosen: jax.Array
) -> jax.Array:
    """A product: [N·k, F] in the dtype of x from tokens if gated, else float32 [split, N·k, M] from such rows."""
    return _forward(form, gated, k, x, weights, layer, chosen, raw=False)[0]


def _product_forward(
    form: Form, gated: bool, k: int, x: jax.Array, weights: Weights, layer: jax.Array, chosen: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    tiles = form.gate_up
    if tiles.rows == 1:  # of the form that writes nothing besides
        tiles = Tiles(16, 64, 128, 4, 3)
    elif isinstance(weights, Quantized):  # registers for what is written besides
        tiles = dataclasses.replace(tiles, rows=max(tiles.rows // 2, 16))
    form = dataclasses.replace(form, gate_up=tiles)
    out = _forward(form, gated, k, x, weights, layer, chosen, raw=gated)
    return out[0], (x, weights, layer, chosen, *out[1:])


def _product_backward(form: Form, gated: bool, k: int, residuals: tuple[Any, ...], d: jax.Array) -> tuple[Any, ...]:
    x, weights, layer, chosen, *raw = residuals
    E = weights.shape[1]
    n = chosen.size
    if gated:
        gate, up = raw[0][:, 0].astype(jnp.float32), raw[0][:, 1].astype(jnp.float32)
        _, undo = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        d = jnp.concatenate(undo(d.astype(jnp.float32)), axis=1)
    else:
        d = d[0]  # the parts of a split sum all have the same gradient
    d = d.astype(x.dtype)  # [N·k, O]
    rows = _rows_gradient(form, d, weights, layer, route(chosen, E, form.rows_gradient.rows))
    rows = jnp.where((chosen.reshape(-1) < E)[:, None], rows, 0.0)  # of padding, which no kernel wrote
    d_x = jnp.sum(rows.reshape(-1, k, x.shape[1]), axis=1) if gated else rows
    d_weights = None
    if not isinstance(weights, Quantized):
        d_weights = _weights_gradient(form, gated, k, d, x, weights, layer, route(chosen, E, n))
    return d_x.astype(x.dtype), d_weights, None, None


product.defvjp(_product_forward, _product_backward)


def _stored(weights: Weights, layer: jax.Array) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Constants that tell a kernel how weights are stored, values, and scales (anything, if there are none)."""
    bits = bits_of(weights)
    if isinstance(weights, Quantized):
        return {"BITS": bits, "GROUP": weights.group}, weights.values, weights.scales
    return {"BITS": 0, "GROUP": 0}, weights, layer


def _precision(dtype: Any) -> str:
    return "ieee" if dtype == jnp.float32 else "tf32"  # of float32 products; bfloat16 ones are exact


def _forward(
    form: Form, gated: bool, k: int, x: jax.Array, weights: Weights, layer: jax.Array, chosen: jax.Array, raw: bool
) -> list[jax.Array]:
    from m1jax.kernels.experts import kernels, single

    L, E, I = *weights.shape[:2], x.shape[1]
    O = weights.shape[3] if gated else weights.shape[2]
    n = chosen.size
    tiles = form.gate_up if gated else form.down
    few = n <= FEW
    if few:
        order = table = chosen.reshape(-1)
        count = n
    else:
        order, table, _ = route(chosen, E, tiles.rows)
        count = table.shape[0]
    stored, values, scales = _stored(weights, layer)
    split = 1 if gated else tiles.split
    out = [jax.ShapeDtypeStruct((n, O) if gated else (split, n, O), x.dtype if gated else jnp.float32)]
    ptx = not form.interpreted and x.dtype == jnp.bfloat16
    if tiles.rows == 1:
        return launch(
            single.forward_of_rows, x, values, scales, layer, chosen.reshape(-1), out=out,
            grid=(n * -(-O // tiles.out), split), warps=tiles.warps, stages=tiles.stages, interpreted=form.interpreted,
            O=O, I=I, L=L, E=E, k=k, N=n, GATED=gated, BY_TOKEN=gated, SPLIT=split, BO=tiles.out, BI=tiles.inner,
            PTX=ptx,
        )  # fmt: skip
    constants: dict[str, Any] = {} if raw else {"raw": None}
    if raw:
        out.append(jax.ShapeDtypeStruct((n, 2, O), x.dtype))
    return launch(
        kernels.forward, x, values, scales, layer, table, order, out=out, grid=(count * -(-O // tiles.out), split),
        warps=tiles.warps, stages=tiles.stages, interpreted=form.interpreted, **constants, **stored,
        O=O, I=I, L=L, E=E, k=k, N=n, POWER=1 << (n - 1).bit_length() if few else 1, GATED=gated, BY_TOKEN=gated,
        FEW=few, RAW=raw, SPLIT=split, R=tiles.rows, BO=tiles.out, BI=tiles.inner, PRECISION=_precision(x.dtype),
        PTX=ptx,
    )  # fmt: skip


def _rows_gradient(form: Form, d: jax.Array, weights: Weights, layer: jax.Array, routing: Routing) -> jax.Array:
    """d [N·k, O] times the matrix of each row's expert: float32 [N·k, I]."""
    from m1jax.kernels.experts import kernels

    tiles, (L, E), I = form.rows_gradient, weights.shape[:2], weights.shape[-1]
    stored, values, scales = _stored(weights, layer)
    inner = stored["GROUP"] if stored["BITS"] == 4 else tiles.inner
    (out,) = launch(
        kernels.backward_rows, d, values, scales, layer, routing.table, routing.order,
        out=[jax.ShapeDtypeStruct((d.shape[0], I), jnp.float32)], grid=(routing.table.shape[0] * -(-I // inner),),
        warps=tiles.warps, stages=tiles.stages, interpreted=form.interpreted, **stored,
        O=d.shape[1], I=I, L=L, E=E, R=tiles.rows, BO=tiles.out, BI=inner, PRECISION=_precision(d.dtype),
    )  # fmt: skip
    return out


def _weights_gradient(
    form: Form, gated: bool, k: int, d: jax.Array, x: jax.Array, weights: jax.Array, layer: jax.Array, routing: Routing
) -> jax.Array:
    from m1jax.kernels.experts import kernels

    tiles, (O, I), E = form.weights_gradient, (d.shape[1], x.shape[1]), weights.shape[1]
    (out,) = launch(
        kernels.backward_weights, d, x, routing.order, routing.bounds,
        out=[jax.ShapeDtypeStruct((1, *weights.shape[1:]), weights.dtype)],
        grid=(-(-O // tiles.out) * -(-I // tiles.inner), E),
        warps=tiles.warps, stages=tiles.stages, interpreted=form.interpreted,
        O=O, I=I, k=k, BY_TOKEN=gated, R=tiles.rows, BO=tiles.out, BI=tiles.inner, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    if weights.shape[0] == 1:
        return out
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(weights), out, layer[0], 0)
