"""Lightning attention on Hopper in Pallas' Mosaic GPU dialect: the sweeps of `kernels.py`, a warp group for each job.

A program sweeps over the chunks of one head of one row for 64 channels of c and out. Only the state goes from chunk to
chunk, so its group does little more than that, and the others work ahead of it and after it:

    the TMA unit   copies the chunks' tiles of a, b, c to shared memory
    ACTIVATES      applies silu to b, in place
    STATE          has the state, transposed, in its registers, leaves it rounded to bfloat16 in shared memory before
                   each chunk, and adds the chunk to it; while that multiplies, silu of the next c, weighted by decay
    OUTPUT         two groups, one for every other chunk: silu of a in registers, a bᵀ, masked, and times c, a times the
                   state; hands out to the TMA unit

Decay takes no work in the scores: with c'_j = λ^(31-j) c_j for the 64 tokens of a chunk, and the state S = λ³² U,

    out_i = λ^(i-31) (a_i (λ⁶⁴ U) + Σ_{j ≤ i} (a_i·b_j) c'_j),   U ← λ⁶⁴ U + Σ_j b_jᵀ c'_j

and in the other direction with λ^(j-31) and λ^(31-i). Powers and data share the exponents of float32 and bfloat16. So
the powers are centred (with λ^(63-j) and λ^(i-63) gradients of 1e-12 were lost), from 1e-14 to 1e14 for the family's
|log λ| ≤ 1.00001; and where gradients are swept, which are rather small than large, times 2²⁴.

A chunk of n < 64 tokens is one of 64 with zeros, after which U is λ^(64-n) times too small. In the other direction it
comes first; there λ⁶⁴ U is carried, or U would begin with λ^(n-96), which is no number.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m1jax.kernels.lightning_attention.gpu import FASTEST, WIDTH

CHUNK = 64  # tokens
CENTRE = CHUNK // 2 - 1
LIFT = 24  # c and the state of a sweep for gradients are 2^LIFT times as large
STATE, ACTIVATES, OUTPUT = range(3)  # warp groups; those from OUTPUT on write out
OUTPUTS = 2
_GRADIENT = 3  # as a source; 0, 1, 2 are q, k, v
_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is tuned by: chunks of b and c in their ring, and registers of a thread of each kind of group.

    The chunks are a multiple of OUTPUTS: an output group waits for every turn of the places that are its own. Of the
    registers the program counter has two, and `check_kernels.py` tells a group whose code uses more than the others.
    """

    slots: int = 4
    registers: tuple[int, int, int] = (112, 80, 160)


@dataclasses.dataclass(frozen=True)
class Role:
    """What is swept: sources of a, b, c (0, 1, 2: q, k, v before their activation; 3: the gradient of o), what out is
    the gradient of, if of anything, and the direction.
    """

    a: int
    b: int
    c: int
    raw: int | None = None
    reversed: bool = False


_FORWARD = (Role(0, 1, 2),)
_BACKWARD = (Role(3, 2, 1, raw=0), Role(2, 3, 0, raw=1, reversed=True), Role(1, 0, 3, raw=2, reversed=True))


def forward(
    part: int,
    qkv: jax.Array,
    log_decay: jax.Array,
    lengths: jax.Array,
    before: jax.Array | None,
    interpreted: bool,
) -> tuple[jax.Array, jax.Array]:
    """o, and the states after each part, `[B, parts, H, D, D]`, from those before it, None: zeros.

    Other arguments as of `_sweep`.
    """
    states = [None if before is None else before.swapaxes(-1, -2)]
    o, after = _sweep(Plan(), _FORWARD, part, qkv, None, log_decay, lengths, states, 0, interpreted)
    assert after is not None
    return o, after.swapaxes(-1, -2)


def backward(
    part: int,
    qkv: jax.Array,
    grad: jax.Array,
    log_decay: jax.Array,
    lengths: jax.Array,
    before: jax.Array | None,
    after: jax.Array,
    want_final: bool,
    interpreted: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of qkv and, if wanted, of the states before each part, else `[1]`.

    Given the states before each part and the gradients of those after it, `[B, parts, H, D, D]`; other arguments as of
    `_sweep`.
    """
    states, final_of = [before, after, after.swapaxes(-1, -2)], 2 if want_final else None
    d_qkv, d_before = _sweep(Plan(), _BACKWARD, part, qkv, grad, log_decay, lengths, states, final_of, interpreted)
    return d_qkv, jnp.zeros((1,), jnp.float32) if d_before is None else d_before.swapaxes(-1, -2)


def _sweep(
    plan: Plan,
    roles: Sequence[Role],
    part: int,
    qkv: jax.Array,
    grad: jax.Array | None,
    log_decay: jax.Array,
    lengths: jax.Array,
    states: Sequence[jax.Array | None],
    final_of: int | None,
    interpreted: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Sweeps over all parts of all rows at once, for each role.

    Args:
      part: tokens of a part, a multiple of CHUNK; the last of a row may have fewer.
      qkv: bfloat16 `[B, T, H, 3, D]`; grad: bfloat16 `[B, T, H, D]`, for the roles that have it as a source.
      log_decay: float32 `[H]`, log λ; lengths: int32 `[B]`.
      states: for each role float32 `[B, parts, H, D, D]` (c's channels, b's channels) before each part in the role's
        direction, or None: zeros.
      final_of: the role of which the states after each part are wanted.

    Returns:
      For one role its out `[B, T, H, D]`, for three all of theirs `[B, T, H, 3, D]`, zero at padded tokens; and the
      states after each part, as those before it.
    """
    B, T, H, _, D = qkv.shape
    parts, blocks = pl.cdiv(T, part), D // WIDTH
    programs = B * parts * H * blocks
    given = [s for s in states if s is not None]

    def body(*refs: Any) -> None:
        qkv, grad, log_decay, lengths, *rest = refs
        given_refs, (out, *final, shared) = iter(rest[: len(given)]), rest[len(given) :]
        before = [None if s is None else next(given_refs) for s in states]

        def run(i: int, group: int) -> None:
            """What a warp group does for a role."""
            # The barrier makes each group work out its place by itself: in registers for all it would be spilled.
            number = lax.optimization_barrier(lax.axis_index("program"))
            head, place = lax.rem(lax.div(number, blocks), H), lax.rem(lax.div(number, blocks * H), B * parts)
            row, place = lax.div(place, parts), lax.rem(place, parts)
            channels = pl.ds(lax.rem(number, blocks) * WIDTH, WIDTH)
            tokens = jnp.clip(T - place * part, 0, part)

            def tile(source: int, first: Any, channels: Any = slice(None)) -> Any:
                tokens = pl.ds(place * part + first, CHUNK)
                if source == _GRADIENT:
                    return grad.at[row, tokens, head, channels]
                return qkv.at[row, tokens, head, source, channels]

            def out_tile(first: Any) -> Any:
                tokens = pl.ds(place * part + first, CHUNK)
                return out.at[(row, tokens, head, *((i,) if len(roles) > 1 else ()), channels)]

            def state(refs: Any) -> Any:
                return None if refs is None else refs.at[row, place, head, channels]

            _Program(
                plan, roles[i], D, tile, out_tile, channels, tokens,
                jnp.clip(lengths[row] - place * part, 0, tokens), log_decay[head],
                state(before[i]), state(final[0]) if i == final_of else None, shared,
            ).run(group)  # fmt: skip

        role, group = lax.div(lax.axis_index("program"), programs), lax.axis_index("group")
        for i in range(len(roles)):
            for g in range(OUTPUT + OUTPUTS):
                pl.when((role == i) & (group == g))(functools.partial(run, i, g))

    tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)

    shared = {
        "a": tiles(OUTPUTS, CHUNK, D),
        "b": tiles(plan.slots, CHUNK, D),
        "c": tiles(plan.slots, CHUNK, WIDTH),
        "s": tiles(OUTPUTS, WIDTH, D),
        "out": tiles(OUTPUTS, CHUNK, WIDTH),  # before, what it is the gradient of
        "a_loaded": plgpu.Barrier(num_barriers=OUTPUTS),
        "raw_loaded": plgpu.Barrier(num_barriers=OUTPUTS),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=plan.slots),
        "activated": plgpu.Barrier(num_barriers=plan.slots),
        "rounded": plgpu.Barrier(num_barriers=OUTPUTS),
        "read": plgpu.Barrier(num_barriers=OUTPUTS),  # the state, and all else of the chunk
    }
    if interpreted:  # it multiplies from shared memory only
        shared |= {"a_operand": tiles(OUTPUTS, CHUNK, D), "scores": tiles(OUTPUTS, CHUNK, CHUNK)}
    out_type = [jax.ShapeDtypeStruct(qkv.shape if len(roles) > 1 else (B, T, H, D), jnp.bfloat16)]
    if final_of is not None:
        out_type.append(jax.ShapeDtypeStruct((B, parts, H, D, D), jnp.float32))
    out = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[shared],
        grid=(len(roles) * programs,),
        grid_names=("program",),
        num_threads=OUTPUT + OUTPUTS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            # Each thread reads back only what it wrote itself; what others wrote it waits for.
            unsafe_no_auto_barriers=True,
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(qkv, qkv if grad is None else grad, log_decay, lengths, *given)
    return out[0], None if final_of is None else out[1]


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of the grid, as its warp groups see it. Tokens count from the first of its part."""

    plan: Plan
    role: Role
    D: int
    tile: Any  # of a source, from a token on
    out_tile: Any
    channels: Any
    tokens: jax.Array
    valid: jax.Array
    log_decay: jax.Array
    before: Any
    final: Any
    shared: dict[str, Any]

    @property
    def chunks(self) -> jax.Array:
        return lax.div(self.valid + CHUNK - 1, CHUNK)

    @property
    def interpreted(self) -> bool:
        return "scores" in self.shared

    @property
    def lift(self) -> int:
        return 0 if self.role.raw is None else LIFT

    def power(self, exponent: jax.Array, lift: int) -> jax.Array:
        """Of λ, times 2^lift; not a number where others would be lost."""
        log_decay = jnp.where(self.log_decay < FASTEST, jnp.nan, self.log_decay)
        return jnp.exp2(log_decay * _LOG2_E * exponent.astype(jnp.float32) + lift)

    def chunk(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first token of a step's chunk, and how many are valid."""
        first = (self.chunks - 1 - step if self.role.reversed else step) * CHUNK
        return first, jnp.minimum(self.valid - first, CHUNK)

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, self.plan.slots)

    def run(self, group: int) -> None:
        wanted = self.plan.registers[min(group, OUTPUT)]
        level = 65536 // 128 // (OUTPUT + OUTPUTS)  # registers of a thread at the start
        plgpu.set_max_registers(wanted, action="increase" if wanted > level else "decrease")
        if group == STATE:
            self.update()
        elif group == ACTIVATES:
            self.activate()
        else:
            self.output(group - OUTPUT)

    def load(self, step: jax.Array) -> None:
        """Starts the copies of a step's b and c into the ring."""
        slot, (first, _) = self.slot(step), self.chunk(step)
        barrier = self.shared["loaded"].at[slot]
        plgpu.copy_gmem_to_smem(self.tile(self.role.b, first), self.shared["b"].at[slot], barrier)
        plgpu.copy_gmem_to_smem(self.tile(self.role.c, first, self.channels), self.shared["c"].at[slot], barrier)

    def update(self) -> None:
        """The state's group."""
        chunks, reversed = self.chunks, self.role.reversed
        for step in range(self.plan.slots):
            pl.when(step < chunks)(lambda step=step: self.load(jnp.int32(step)))

        # The last chunk's zeros are made up for at the row's end, whichever way the sweep goes.
        half = jnp.where(chunks > 0, CHUNK // 2, 0)
        begin, end = -half, half + self.valid - chunks * CHUNK
        enters, leaves = (end, begin) if reversed else (begin, end)
        if self.before is None:
            s = plgpu.layout_cast(jnp.zeros((WIDTH, self.D), jnp.float32), plgpu.Layout.WGMMA)
        else:
            s = plgpu.load(self.before, layout=plgpu.Layout.WGMMA, optimized=False)
            s = s * self.power(enters, self.lift)
        self.weigh(jnp.int32(0))
        s = lax.fori_loop(0, chunks, self.advance, s)
        if self.final is not None:
            self.final[...] = s * self.power(leaves, -self.lift)

        @pl.loop(jnp.maximum(chunks - OUTPUTS, 0), chunks)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(self.shared["read"].at[lax.rem(step, OUTPUTS)])

        self.clear_rest()

    def advance(self, step: jax.Array, s: jax.Array) -> jax.Array:
        """One chunk: leaves the state before it to the output group, returns that after it."""
        shared, slot, buffer = self.shared, self.slot(step), lax.rem(step, OUTPUTS)
        s = s if self.role.reversed else self.decayed(s)

        @pl.when(step >= OUTPUTS)
        def _() -> None:
            plgpu.barrier_wait(shared["read"].at[buffer])
            following = step - OUTPUTS + self.plan.slots
            pl.when(following < self.chunks)(lambda: self.load(following))

        shared["s"].at[buffer][...] = s.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared["rounded"].at[buffer])
        plgpu.barrier_wait(shared["activated"].at[slot])

        def product(acc: Any) -> Any:
            plgpu.wgmma(acc, shared["c"].at[slot].transpose((1, 0)), shared["b"].at[slot])
            self.weigh(step + 1)
            return acc[...] if self.interpreted else plgpu.wgmma_wait(0)

        if self.interpreted:
            s = s + pl.run_scoped(product, plgpu.ACC((WIDTH, self.D), jnp.float32))
        else:
            s = pl.run_state(lambda acc: product(acc) and None)(plgpu.ACC.init(s))
        return self.decayed(s) if self.role.reversed else s

    def decayed(self, s: jax.Array) -> jax.Array:
        """λ⁶⁴ s."""
        x = self.log_decay * CHUNK
        return lax.cond(x > -0.5, lambda s: s + s * _less_one(x), lambda s: s * jnp.exp2(x * _LOG2_E), s)

    def weigh(self, step: jax.Array) -> None:
        """Activates a step's c and weights it by decay, in place, if there is such a step."""

        @pl.when(step < self.chunks)
        def _() -> None:
            slot, (_, count) = self.slot(step), self.chunk(step)
            token = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            weights = self.power(token - CENTRE if self.role.reversed else CENTRE - token, self.lift)
            c = self.shared["c"].at[slot]
            plgpu.barrier_wait(self.shared["loaded"].at[slot])
            _clear(c, count)
            x = _read(c)
            x = x.astype(jnp.float32) if self.role.c == _GRADIENT else _silu(x)
            c[...] = (x * _rows(weights)).astype(jnp.bfloat16)

    def activate(self) -> None:
        """The group that activates b."""

        @pl.loop(0, self.chunks)
        def _(step: jax.Array) -> None:
            slot, (_, count) = self.slot(step), self.chunk(step)
            plgpu.barrier_wait(self.shared["loaded"].at[slot])

            for half in range(self.D // WIDTH):
                b = self.shared["b"].at[slot, :, pl.ds(half * WIDTH, WIDTH)]
                _clear(b, count)
                if self.role.b != _GRADIENT:
                    b[...] = _silu(_read(b)).astype(jnp.bfloat16)

            plgpu.commit_smem()
            plgpu.barrier_arrive(self.shared["activated"].at[slot])

    def output(self, w: int) -> None:
        """Output group w, of chunks w, w + 2, ..."""
        shared = self.shared
        a_tile, out_tile = shared["a"].at[w], shared["out"].at[w]
        token = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        scales = self.power(CENTRE - token if self.role.reversed else token - CENTRE, -self.lift)

        def load(step: jax.Array) -> None:
            @pl.when(step < self.chunks)
            def _() -> None:
                tile = self.tile(self.role.a, self.chunk(step)[0])
                plgpu.copy_gmem_to_smem(tile, a_tile, shared["a_loaded"].at[w])

        load(jnp.int32(w))

        @pl.loop(0, lax.div(self.chunks - w + OUTPUTS - 1, OUTPUTS))
        def _(own: jax.Array) -> None:
            step = own * OUTPUTS + w
            slot, (first, count) = self.slot(step), self.chunk(step)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.role.raw is not None:
                raw = self.tile(self.role.raw, first, self.channels)
                plgpu.copy_gmem_to_smem(raw, out_tile, shared["raw_loaded"].at[w])
            plgpu.barrier_wait(shared["a_loaded"].at[w])
            a = _read(a_tile)
            plgpu.commit_smem()  # until all have read
            load(step + OUTPUTS)
            a = _valid(a, count)
            a = a if self.role.a == _GRADIENT else _silu(a).astype(jnp.bfloat16)
            if self.interpreted:
                shared["a_operand"].at[w][...] = a
                a = shared["a_operand"].at[w]
            plgpu.barrier_wait(shared["activated"].at[slot])
            scores = self.scores(a, slot)
            if self.interpreted:
                shared["scores"].at[w][...] = scores
                scores = shared["scores"].at[w]
            plgpu.barrier_wait(shared["rounded"].at[w])

            def products(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, a, shared["s"].at[w].transpose((1, 0)))
                plgpu.wgmma(acc, scores, shared["c"].at[slot])
                return acc[...]

            out = pl.run_scoped(products, plgpu.ACC((CHUNK, WIDTH), jnp.float32)) * _rows(scales)
            plgpu.barrier_arrive(shared["read"].at[w])
            if self.role.raw is not None:
                plgpu.barrier_wait(shared["raw_loaded"].at[w])
                out = out * _silu_gradient(_valid(_read(out_tile), count))
            out_tile[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, self.out_tile(first))

        plgpu.wait_smem_to_gmem(0)

    def scores(self, a: Any, slot: jax.Array) -> jax.Array:
        """a bᵀ, zero where b does not come before a."""

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, a, self.shared["b"].at[slot].transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(product, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
        out, source = (_index((CHUNK, CHUNK), axis) for axis in (0, 1))
        seen = source >= out if self.role.reversed else source <= out
        return jnp.where(seen, scores, 0.0).astype(jnp.bfloat16)

    def clear_rest(self) -> None:
        """Zeros to the chunks without a valid token, when all else has been read."""
        place = self.shared["c"].at[0]
        place[...] = plgpu.layout_cast(jnp.zeros((CHUNK, WIDTH), jnp.bfloat16), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        @pl.loop(self.chunks, pl.cdiv(self.tokens, CHUNK))
        def _(chunk: jax.Array) -> None:
            plgpu.copy_smem_to_gmem(place, self.out_tile(chunk * CHUNK))

        plgpu.wait_smem_to_gmem(0)


def _index(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _read(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)


def _rows(x: jax.Array) -> jax.Array:
    """`[64]` along the rows of `[64, 64]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHUNK, WIDTH), [0]), plgpu.Layout.WGMMA)


def _clear(ref: Any, count: jax.Array) -> None:
    """Zeros after the first `count` tokens; full chunks, all but a row's last, are left as they are, as by `_valid`."""

    @pl.when(count < CHUNK)
    def _() -> None:
        ref[...] = _cleared(_read(ref), count)


def _valid(x: jax.Array, count: jax.Array) -> jax.Array:
    return lax.cond(count < CHUNK, lambda x: _cleared(x, count), lambda x: x, x)


def _cleared(x: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(_index(x.shape, 0) < count, x, jnp.zeros_like(x))


def _silu(x: jax.Array) -> jax.Array:
    half = x.astype(jnp.float32) * 0.5
    return half * jnp.tanh(half) + half


def _silu_gradient(x: jax.Array) -> jax.Array:
    half = x.astype(jnp.float32) * 0.5
    tanh = jnp.tanh(half)  # with g = (1 + tanh)/2: g (1 + x (1 - g)) = g (1 + half (1 - tanh))
    return (0.5 * tanh + 0.5) * (1.0 + half - half * tanh)


def _less_one(x: jax.Array) -> jax.Array:
    """e^x - 1 for x from -0.5 to 0: e^x itself would lose the digits of slow decays."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
