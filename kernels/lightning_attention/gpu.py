"""Lightning attention on Hopper: how the kernels are put together, and the rule for gradients.

The sweeps over whole rows are `mosaic.py`'s where it does them, bfloat16 rows that are not packed, and else those of
`kernels.py`, in Triton, as are the decode step and the states before parts of a row.

One pass over q, k, v and o, 1,024 bytes a token and head at D = 128 in bfloat16, by one program for each row, head and
block of value channels. Where these are too few for the device, a row is cut into parts: first the state before each
part is found, from what smaller pieces of the parts before it add to the state, then all parts are computed at once.

In bfloat16 the state is kept and summed in float32 and rounded to bfloat16 where it is multiplied with q, the scores
where they are multiplied with v: errors the size of those of rounding q, k, v themselves. In float32 all products are
float32 on the ordinary cores: exact, not fast.

The norm over H·D and the output gate that follow are left to XLA: a kernel of them would read o and the gate and write
once, 48 KB a token for M1 in bfloat16, where a second reading of o makes it 64 KB at worst; the layer's projections
take about a hundred times as long as those 16 KB. By count, not yet by measurement.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from m1jax.kernels.gpu import launch
from m1jax.kernels.gpu.tiles import MULTIPROCESSORS
from m1jax.kernels.segments import valid_and_starts

HEAD_DIMS = (32, 64, 128)
MOSAIC_HEAD_DIMS = (64, 128)
MOSAIC_TOKENS = 8  # rows of a tile in shared memory, which it does not cut
MOSAIC_FROM = 256  # tokens: shorter rows are less than the states, which Triton updates in place
WIDTH = 64  # channels of a program of Mosaic's
FASTEST = -1.25  # log λ below which Mosaic's sweeps, with powers of λ up to λ^±32, would lose small gradients
LEAST_PART = 1024  # tokens
PIECES = 4  # of each part whose state is wanted; the programs that find it are small and short

# How the sweeps for o, dq, dk and dv activate a, b, c and differentiate in bfloat16.
ACTIVATION = {
    "o": ("tanh", "tanh", "tanh", "none"),
    "q": ("move", "tanh", "tanh", "tanh"),
    "k": ("tanh", "move", "tanh", "tanh"),
    "v": ("tanh", "tanh", "none", "tanh"),
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a kernel is tuned by: tokens of a chunk, channels of a block of the state, warps, stages of pipelining."""

    chunk: int
    width: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Form:
    """How to run: tiles of the forward and backward sweeps, of those for states alone (whose chunks are as long as the
    others'), and of the decode step, whether Mosaic's sweeps are used instead, and whether in the interpreter.
    """

    forward: Tiles
    backward: Tiles
    states: Tiles
    step: Tiles
    interpreted: bool = False
    parts: int | None = None  # of each row; None chooses
    mosaic: bool = False


def default_form(D: int, dtype: Any, packed: bool, interpreted: bool = False, mosaic: bool = False) -> Form:
    """The tiles for a head_dim and dtype; those for packed rows, which need more registers, are narrower."""
    step = Tiles(1, min(32, D), 8, 1)
    if dtype == jnp.float32:
        sweep = Tiles(16, 16, 8, 1)
        return Form(sweep, sweep, sweep, step, interpreted)
    sweep = Tiles(64, min(32, D), 4, 1) if packed else Tiles(64, min(64, D), 4, 2)
    return Form(sweep, sweep, Tiles(64, D, 8, 2), step, interpreted, mosaic=mosaic)


def refusal_of_mosaic(qkv: Any, packed: bool, log_decay: Any) -> str | None:
    """Why Mosaic's sweeps do not do this, whatever the device; None if they do."""
    T, D, dtype = qkv.shape[1], qkv.shape[4], qkv.dtype
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    if D not in MOSAIC_HEAD_DIMS or dtype != jnp.bfloat16:
        return f"it takes bfloat16 and a head_dim of {MOSAIC_HEAD_DIMS}, got {dtype} and {D}"
    if T % MOSAIC_TOKENS or packed:
        return f"it takes rows of a multiple of {MOSAIC_TOKENS} tokens, without segments, got {T} tokens"
    if not isinstance(log_decay, Tracer) and np.any(np.asarray(log_decay) < FASTEST):
        return f"it takes a log_decay from {FASTEST} on, got {np.min(np.asarray(log_decay)):.3g}"
    return None


def refusal(D: int, dtype: Any) -> str | None:
    """Why these kernels do not do this head_dim or dtype; None if they do."""
    if D not in HEAD_DIMS:
        return f"head_dim {D} is not one of {HEAD_DIMS}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {dtype} is not float32 or bfloat16"
    return None


def attend(
    form: Form,
    qkv: jax.Array,
    log_decay: jax.Array,
    states: jax.Array | None,
    layer: jax.Array | int,
    lengths: jax.Array,
    segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as of the API, but states float32 `[P, B, H, D, D]` of which `layer` is meant, or None for zeros.

    Returns:
      o, and the states with that layer's replaced (`[1, B, H, D, D]` for None).
    """
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    return _attend(form, qkv, log_decay, states, layer, lengths.astype(jnp.int32), _bounds(segments, lengths))


def _bounds(segments: jax.Array | None, lengths: jax.Array) -> jax.Array | None:
    """First and last token of each token's segment, int32 `[B, 2, T]`: T and -1 at padding.

    The segment that goes on with the state before the row starts at -1.
    """
    if segments is None:
        return None
    T = segments.shape[1]
    position = jnp.arange(T, dtype=jnp.int32)
    valid, start = valid_and_starts(lengths, T, segments)
    first = lax.cummax(jnp.where(start, position, -1), axis=1)
    ends = jnp.pad(start | ~valid, ((0, 0), (0, 1)), constant_values=True)[:, 1:]  # the next token is not of it
    last = lax.cummin(jnp.where(ends, position, T), axis=1, reverse=True)
    return jnp.stack([jnp.where(valid, first, T), jnp.where(valid, last, -1)], axis=1)


def _starting(bounds: jax.Array) -> jax.Array:
    """Where a segment starts, bool `[B, T]`."""
    return bounds[:, 0] == jnp.arange(bounds.shape[2])


def _chunk_facts(bounds: jax.Array, chunk: int) -> jax.Array:
    """For each chunk its length up to the last valid token, and whether no segment starts in it; int32 `[B, n, 2]`."""
    B, _, T = bounds.shape
    n = -(-T // chunk)

    def by_chunk(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, n * chunk - T))).reshape(B, n, chunk)

    length = jnp.max(jnp.where(by_chunk(bounds[:, 1] >= 0), 1 + jnp.arange(chunk), 0), axis=2)
    return jnp.stack([length, ~jnp.any(by_chunk(_starting(bounds)), axis=2)], axis=2).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    form: Form,
    qkv: jax.Array,
    log_decay: jax.Array,
    states: jax.Array | None,
    layer: jax.Array,
    lengths: jax.Array,
    bounds: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    if qkv.shape[1] == 1 and bounds is None and states is not None:
        return _step(form, qkv, log_decay, states, layer, lengths)
    sweep = Sweep(form, form.forward, qkv, log_decay, lengths, bounds)
    if sweep.parts == 1:
        return sweep.forward(states, layer)
    out, after = sweep.forward(sweep.prefix(_pick(states, layer))[None], jnp.zeros_like(layer))
    last = after[0, :, -1]
    return out, last[None] if states is None else states.at[layer[0]].set(last)


def _forward_rule(form: Form, *args: Any) -> tuple[Any, Any]:
    return _attend(form, *args), args


def _backward_rule(form: Form, args: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    qkv, log_decay, states, layer, lengths, bounds = args
    d_out, d_states = gradients
    sweep = Sweep(form, form.backward, qkv, log_decay, lengths, bounds)
    before, after = _pick(states, layer), _pick(d_states, layer)
    assert after is not None
    if sweep.parts == 1:
        before, after = None if before is None else before[:, None], after[:, None]
    else:
        before, after = sweep.prefix(before), sweep.suffix(d_out, after)
    d_qkv, d_before = sweep.backward(d_out, before, after, want_final=states is not None)
    d_states = None if states is None else d_states.at[layer[0]].set(d_before[:, 0])
    return d_qkv, jnp.zeros_like(log_decay), d_states, None, None, None


_attend.defvjp(_forward_rule, _backward_rule)


def _pick(states: jax.Array | None, layer: jax.Array) -> jax.Array | None:
    return None if states is None else states[layer[0]]


def _step(
    form: Form, qkv: jax.Array, log_decay: jax.Array, states: jax.Array, layer: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    from m1jax.kernels.lightning_attention import kernels

    B, _, H, _, D = qkv.shape
    tiles = form.step
    out, states = launch(
        kernels.step, qkv, log_decay, lengths, layer, states,
        out=(jax.ShapeDtypeStruct((B, 1, H, D), qkv.dtype), _like(states)),
        aliases={4: 1}, grid=(D // tiles.width, H, B), warps=tiles.warps, stages=tiles.stages,
        interpreted=form.interpreted, ROWS=B, LAYERS=states.shape[0], H=H, D=D, WIDTH=tiles.width,
    )  # fmt: skip
    return out, states


class Sweep:
    """One call's arguments in the form the sweeping kernels want them."""

    def __init__(
        self,
        form: Form,
        tiles: Tiles,
        qkv: jax.Array,
        log_decay: jax.Array,
        lengths: jax.Array,
        bounds: jax.Array | None,
    ):
        self.form, self.tiles, self.qkv, self.lengths, self.bounds = form, tiles, qkv, lengths, bounds
        self.log_decay = log_decay
        self.states_tiles = dataclasses.replace(form.states, chunk=tiles.chunk)  # as long: tables are for this length
        B, T, H, _, D = qkv.shape
        self.shape = B, T, H, D
        # What the kernels read of packed rows; of others nothing, but something must be passed.
        self.tables = (lengths, lengths) if bounds is None else (bounds, _chunk_facts(bounds, tiles.chunk))
        width, at_once = (WIDTH, 1) if form.mosaic else (tiles.width, 2)
        fit = max(1, min(at_once * MULTIPROCESSORS // (B * H * (D // width)), T // LEAST_PART))
        wanted = fit if form.parts is None else form.parts
        pieces = PIECES if wanted > 1 else 1
        self.piece = -(-T // (tiles.chunk * wanted * pieces)) * tiles.chunk  # tokens of a piece of a part
        self.part = self.piece * pieces
        self.parts = -(-T // self.part)

    def forward(self, states: jax.Array | None, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One pass: o and the states after each part.

        With states `[P, B, H, D, D]` these are replaced in place, as `[1, B, parts, H, D, D]` before each part are.
        """
        if self.form.mosaic:
            return self._mosaic_forward(states, layer)
        B, T, H, D = self.shape
        final = jax.ShapeDtypeStruct((1, B, H, D, D), jnp.float32) if states is None else _like(states)
        out = jax.ShapeDtypeStruct((B, T, H, D), self.qkv.dtype)
        return self._forward(states, layer, (out, final), self.tiles, (0, self.part, self.parts))

    def _forward(
        self, states: jax.Array | None, layer: jax.Array, out: Any, tiles: Tiles, cut: tuple[int, int, int]
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        from m1jax.kernels.lightning_attention import kernels

        given = self.log_decay if states is None else states
        arrays = (self.qkv, self.log_decay, self.lengths, *self.tables, layer, given)
        o, final = self._launch(
            kernels.forward, tiles, cut, *arrays, out=out, aliases={} if states is None else {6: 1},
            LAYERS=1 if states is None else states.shape[0], FRESH=states is None, WRITE=_wanted(out[0]),
            **self._how("o"),
        )  # fmt: skip
        return o, final

    def backward(
        self, d_out: jax.Array, before: jax.Array | None, after: jax.Array, want_final: bool
    ) -> tuple[jax.Array, jax.Array]:
        """All gradients, given the states before each part and those of the states after it, `[B, parts, H, D, D]`.

        Returns that of qkv and, if wanted, of the states before each part.
        """
        if self.form.mosaic:
            from m1jax.kernels.lightning_attention import mosaic

            return mosaic.backward(
                self.part, self.qkv, d_out, self.log_decay, self.lengths, before, after, want_final,
                self.form.interpreted,
            )  # fmt: skip
        B, _, H, D = self.shape
        cut = 0, self.part, self.parts
        final = jax.ShapeDtypeStruct((B, self.parts, H, D, D) if want_final else (1,), jnp.float32)
        nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
        out = _like(self.qkv)
        d_qkv, _ = self._gradient(d_out, before, None, "q", (out, nothing), self.tiles, cut)
        d_qkv, _ = self._gradient(d_out, after, d_qkv, "k", (out, nothing), self.tiles, cut)
        return self._gradient(d_out, after, d_qkv, "v", (out, final), self.tiles, cut)

    def _gradient(
        self, d_out: jax.Array, states: jax.Array | None, d_qkv: jax.Array | None, role: str, out: Any, tiles: Tiles,
        cut: tuple[int, int, int],
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        from m1jax.kernels.lightning_attention import kernels

        nothing = self.log_decay
        arrays = (
            self.qkv, d_out, self.log_decay, self.lengths, *self.tables,
            jnp.zeros((1,), jnp.int32),
            nothing if states is None else states, nothing if d_qkv is None else d_qkv,
        )  # fmt: skip
        d_qkv, final = self._launch(
            kernels.backward, tiles, cut, *arrays, out=out, aliases={} if d_qkv is None else {8: 0},
            LAYERS=1, FRESH=states is None, WRITE=_wanted(out[0]), FINAL=_wanted(out[1]), ROLE=role, **self._how(role),
        )  # fmt: skip
        return d_qkv, final

    def _mosaic_forward(self, states: jax.Array | None, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        from m1jax.kernels.lightning_attention import mosaic

        before = _pick(states, layer)
        if before is not None and self.parts == 1:
            before = before[:, None]
        o, after = mosaic.forward(self.part, self.qkv, self.log_decay, self.lengths, before, self.form.interpreted)
        if self.parts > 1:
            return o, after[None]
        return o, after[:, 0][None] if states is None else states.at[layer[0]].set(after[:, 0])

    def prefix(self, state: jax.Array | None) -> jax.Array:
        """States before each part, `[B, parts, H, D, D]`, from that before the row."""
        B, _, H, D = self.shape
        cut, out = self._pieces(0)
        layer = jnp.zeros((1,), jnp.int32)
        added = self._forward(None, layer, out, self.states_tiles, cut)[1]
        s = jnp.zeros((B, H, D, D), jnp.float32) if state is None else state
        keep, before = self._keep(cut), [s]
        for piece in range(cut[2]):
            s = keep[:, piece, :, None, None] * s + added[:, piece]
            if (piece + 1) % PIECES == 0:
                before.append(s)
        return jnp.stack(before, axis=1)

    def suffix(self, d_out: jax.Array, gradient: jax.Array) -> jax.Array:
        """Gradients of the states after each part, from that after the row."""
        cut, out = self._pieces(self.part)
        added = self._gradient(d_out, None, None, "v", out, self.states_tiles, cut)[1]
        keep, after = self._keep(cut), [gradient]
        for piece in reversed(range(cut[2])):
            gradient = keep[:, piece, :, None, None] * gradient + added[:, piece]
            if piece % PIECES == 0:
                after.append(gradient)
        return jnp.stack(after[::-1], axis=1)

    def _pieces(self, start: int) -> tuple[tuple[int, int, int], Any]:
        """How all parts but one are cut into pieces, from token `start` on; what a sweep for their states returns."""
        B, _, H, D = self.shape
        n = (self.parts - 1) * PIECES
        out = jax.ShapeDtypeStruct((1,), self.qkv.dtype), jax.ShapeDtypeStruct((B, n, H, D, D), jnp.float32)
        return (start, self.piece, n), out

    def _keep(self, cut: tuple[int, int, int]) -> jax.Array:
        """What is left after each piece of the state before it, `[B, pieces, H]`."""
        T = self.shape[1]
        start, length, n = cut
        first = np.minimum(start + length * np.arange(n + 1), T)
        if self.bounds is None:
            count = jnp.diff(jnp.minimum(first, self.lengths[:, None]))
            return jnp.exp(count[..., None] * self.log_decay)

        def sums(x: jax.Array) -> jax.Array:  # over each piece
            return jnp.diff(jnp.pad(jnp.cumsum(x.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))[:, first])

        keep = jnp.exp(sums(self.bounds[:, 1] >= 0)[..., None] * self.log_decay)
        return jnp.where((sums(_starting(self.bounds)) == 0)[..., None], keep, 0.0)

    def _how(self, role: str) -> dict[str, str]:
        """How the sweep for `role` activates a, b, c and differentiates; the interpreter knows no PTX."""
        hows = ACTIVATION[role]
        if self.qkv.dtype == jnp.float32 or self.form.interpreted:
            hows = tuple({"tanh": "exact", "move": "none"}.get(how, how) for how in hows)
        return dict(zip(("A_HOW", "B_HOW", "C_HOW", "RAW_HOW"), hows, strict=True))

    def _launch(
        self, kernel: Any, tiles: Tiles, cut: tuple[int, int, int], *arrays: jax.Array, **extra: Any
    ) -> list[jax.Array]:
        (B, T, H, D), (start, part, parts) = self.shape, cut
        return launch(
            kernel, *arrays, T, start, part, grid=(D // tiles.width, H, B * parts), warps=tiles.warps,
            stages=tiles.stages, interpreted=self.form.interpreted, PARTS=parts, H=H, D=D, WIDTH=tiles.width,
            CHUNK=tiles.chunk, STAGES=tiles.stages, PACKED=self.bounds is not None,
            PRECISION="ieee" if self.qkv.dtype == jnp.float32 else "tf32", **extra,
        )  # fmt: skip


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _wanted(out: jax.ShapeDtypeStruct) -> bool:
    """Whether an output is one, or stands for none, as `[1]`."""
    return len(out.shape) > 1
