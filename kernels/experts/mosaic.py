"""The experts' products of many bfloat16 rows on Hopper, in Pallas' Mosaic GPU dialect: a warp group for each job.

Rows are copied into the order of experts first (of M1's prefill a hundredth of the time), each expert's from a multiple
of BLOCK on, so that every tile is read and written whole by the TMA unit and no expert's rows are another's. Then

    LOADS       fills a ring of tiles in shared memory: 64 channels of one or two blocks of rows, of 256 rows of weights
    MULTIPLIES  two groups, each a block of rows by all 256: 128 registers of sums a thread

The programs, one a multiprocessor, share the tiles among them, each taking the next but so many, and LOADS is already
at the next tile while the sums of the last are written. Tiles of one expert that need the same weights are neighbours,
so that these come from memory once.

Two programs are a pair and load what both need together, each half of it, which spares the L2 cache: `Plan.shared`.
The last block of an expert may stand alone in its tile: then one group multiplies, the other keeps in step.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m1jax.kernels.experts.order import by_bucket, table_of_tiles
from m1jax.kernels.gpu.tiles import MULTIPROCESSORS

BLOCK = 64  # rows that a warp group multiplies
GROUPS = 2  # that multiply
WIDTH = 256  # rows of weights of a tile
INNER = 64  # channels of a step
SPAN = 8  # tiles of rows that take the blocks of out channels together
LOADS = GROUPS  # the warp group after those that multiply


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is tuned by.

    Attributes:
      shared: what the programs of a pair load together: "x", of one tile of rows and two of weights, "weights", of the
        reverse, or None: there are no pairs.
      stages: steps in the ring.
      registers: of a thread that multiplies, and of one that loads.
      programs: all of them.
    """

    shared: Literal["x", "weights"] | None = "weights"
    stages: int = 4
    registers: tuple[int, int] = (232, 40)
    programs: int = MULTIPROCESSORS

    @property
    def stride(self) -> int:
        """Items of work that are done at a time."""
        return self.programs // self.pair

    @property
    def pair(self) -> int:
        """Programs that load together."""
        return 2 if self.shared else 1

    @property
    def blocks(self) -> int:
        """The most blocks of rows of an item of work, which a pair does together."""
        return GROUPS * (2 if self.shared == "weights" else 1)

    @property
    def width(self) -> int:
        """Rows of weights of an item of work."""
        return WIDTH * (2 if self.shared == "x" else 1)


class Layout(NamedTuple):
    """Where the rows are, each expert's from a multiple of BLOCK on, and what is to be done in which order.

    Attributes:
      source: int32 `[R]`, the token of each row; of rows that nobody has, any.
      place: int32 `[N·k]`, the row of each assignment, R for none.
      tiles: int32 `[tiles, 5]`: expert, first row, blocks of rows, and first tile and size of a span of tiles of this
        expert, which take the blocks of out channels together; no blocks for tiles that are not needed, the last ones.
    """

    source: jax.Array
    place: jax.Array
    tiles: jax.Array


def experts(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    chosen: jax.Array,
    plan: Plan | None = None,
    *,
    interpreted: bool = False,
) -> jax.Array:
    """W2 (silu(W1 x) ⊙ W3 x) of each assignment, float32 `[N·k, M]`, anything for none.

    Arguments as in `reference.experts`, but layer int32 `[1]`.
    """
    if plan is None:
        plan = Plan(programs=4) if interpreted else Plan()
    rows = layout(chosen, gate_up.shape[1], plan.blocks)
    h = product(plan, True, x[rows.source], gate_up, layer, rows.tiles, interpreted)
    y = product(plan, False, h, down, layer, rows.tiles, interpreted)
    return y.at[rows.place].get(mode="clip")


def rows_of(assignments: int, E: int) -> int:
    """R, the most rows that so many assignments to E experts can take."""
    return BLOCK * (assignments // BLOCK + E)


def layout(chosen: jax.Array, E: int, most: int) -> Layout:
    """Of the experts `[N, k]` of each token, those equal to E left out, in tiles of up to `most` blocks."""
    N, k = chosen.shape
    flat, R = chosen.reshape(-1), rows_of(N * k, E)
    _, place, counts = by_bucket(flat, E)
    blocks = -(-counts // BLOCK)
    begins = jnp.cumsum(blocks) - blocks
    moved = begins * BLOCK - (jnp.cumsum(counts) - counts)
    place = jnp.where(flat < E, place + moved[jnp.minimum(flat, E - 1)], R)
    token = jnp.arange(N * k, dtype=jnp.int32) // k
    source = jnp.zeros(R, jnp.int32).at[place].set(token, mode="drop")
    tiles = table_of_tiles(blocks, begins, most, N * k // (most * BLOCK) + E, SPAN)
    return Layout(source, place, tiles.at[:, 1].multiply(BLOCK))


def _work(tiles: jax.Array, across: int) -> tuple[jax.Array, jax.Array]:
    """Items of work, int32 `[items, 4]`: expert, first row, blocks of rows, block of out channels of `across`, in the
    order in which they are to be done; and how many are needed, int32 `[1]`, which come first.
    """
    items = jnp.arange(tiles.shape[0] * across, dtype=jnp.int32)
    start = tiles[items // across, 3]
    size = tiles[start, 4]
    local = items - start * across
    expert, first, blocks = tiles[start + local % size, :3].T
    return jnp.stack([expert, first, blocks, local // size], axis=1), jnp.sum(blocks > 0, dtype=jnp.int32).reshape(1)


def product(
    plan: Plan, gated: bool, x: jax.Array, weights: jax.Array, layer: jax.Array, tiles: jax.Array, interpreted: bool
) -> jax.Array:
    """Each row of x `[R, I]` times the matrix of its expert, for the rows of `tiles`; others are undefined.

    If gated silu(W1 x) ⊙ W3 x in bfloat16 for weights `[L, E, 2, O, I]`, else W x in float32 for `[L, E, O, I]`.
    """
    O, I = weights.shape[-2:]
    work, needed = _work(tiles, pl.cdiv(O, plan.width // (1 + gated)))

    def body(*refs: Any) -> None:
        for group in range(GROUPS + 1):
            program = functools.partial(_Program, plan, gated, pl.cdiv(I, INNER), *refs)
            pl.when(lax.axis_index("group") == group)(lambda: program().run(group))  # noqa: B023, called at once

    def in_tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    read = {"num_arrivals": GROUPS, "num_barriers": plan.stages}
    shared = {
        "x": in_tiles(plan.stages, GROUPS * BLOCK, INNER),
        "w": in_tiles(plan.stages, WIDTH, INNER),
        "loaded": plgpu.Barrier(num_arrivals=GROUPS + 1 + gated, num_barriers=plan.stages),
        "read": plgpu.ClusterBarrier(collective_axes=("pair",), **read) if plan.shared else plgpu.Barrier(**read),
    }
    if gated:
        shared["out"] = in_tiles(GROUPS, BLOCK, WIDTH // 2)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], O), jnp.bfloat16 if gated else jnp.float32),
        scratch_types=[shared],
        grid=(plan.stride,),
        grid_names=("program",),
        cluster=(plan.pair,),
        cluster_names=("pair",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(x, weights, layer, work, needed)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program, as its warp groups see it."""

    plan: Plan
    gated: bool
    steps: int  # of a tile
    x: Any
    weights: Any
    layer: Any
    work: Any
    needed: Any
    out: Any
    shared: dict[str, Any]

    @property
    def channels(self) -> int:
        """Out channels of a tile."""
        return WIDTH // (1 + self.gated)

    @property
    def turns(self) -> jax.Array:
        """Items of work of this program."""
        whole = lax.div(self.needed[0], jnp.int32(self.plan.stride))
        return whole + (self.number(whole) < self.needed[0]).astype(jnp.int32)

    def number(self, turn: jax.Array) -> jax.Array:
        """The item of work that is done in a turn.

        Tiles of one expert that a pair shares the weights of are long and short by turns, and the short ones must not
        always be the same programs': these change places.
        """
        program = lax.axis_index("program")
        if self.plan.shared == "weights":
            program = lax.rem(program + 7 * turn, jnp.int32(self.plan.stride))
        return turn * self.plan.stride + program

    def run(self, group: int) -> None:
        """What a warp group does."""
        multiplies, loads = self.plan.registers
        if group == LOADS:
            plgpu.set_max_registers(loads, action="decrease")
            self.each_turn(functools.partial(self.load, self.layer[0]))
            self.wait_for_readers()
        else:
            plgpu.set_max_registers(multiplies, action="increase")
            self.each_turn(functools.partial(self.multiply, group))
            if self.gated:
                plgpu.wait_smem_to_gmem(0)

    def each_turn(self, do: Any) -> None:
        """Calls `do` with a turn's number, expert, first row, blocks of rows and first out channel of this program.

        They are read from memory a turn ahead.
        """

        def item(turn: jax.Array) -> tuple[jax.Array, ...]:
            number = jnp.minimum(self.number(turn), self.work.shape[0] - 1)
            return tuple(self.work[number, i] for i in range(4))

        def one(turn: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            following = item(turn + 1)
            (expert, first, blocks, block), mate = now, lax.axis_index("pair")
            if self.plan.shared == "x":
                block = block * 2 + mate
            elif self.plan.shared == "weights":
                half = lax.div(blocks + 1, jnp.int32(2))
                first, blocks = first + mate * half * BLOCK, jnp.where(mate == 0, half, blocks - half)
            do(turn, expert, first, blocks, block * self.channels)
            return following

        lax.fori_loop(0, self.turns, one, item(jnp.int32(0)))

    def slot(self, turn: jax.Array, step: jax.Array) -> jax.Array:
        """The place of a step in the ring."""
        return lax.rem(turn * self.steps + step, jnp.int32(self.plan.stages))

    def load(
        self,
        layer: jax.Array,
        turn: jax.Array,
        expert: jax.Array,
        first: jax.Array,
        blocks: jax.Array,
        channel: jax.Array,
    ) -> None:
        """Copies the tiles of all steps of a turn to shared memory, each as its place becomes free."""
        shared, channels = self.shared, pl.ds(channel, self.channels)
        parts = [(layer, expert, i) if self.gated else (layer, expert) for i in range(1 + self.gated)]
        together = {name: "pair" if self.plan.shared == name else None for name in ("x", "weights")}

        @pl.loop(0, self.steps)
        def _(step: jax.Array) -> None:
            slot, inner = self.slot(turn, step), pl.ds(step * INNER, INNER)
            loaded, free = shared["loaded"].at[slot], shared["read"].at[slot]
            pl.when(turn * self.steps + step >= self.plan.stages)(lambda: plgpu.barrier_wait(free))
            for group in range(GROUPS):

                @pl.when(group < blocks)
                def _(group: int = group) -> None:
                    block = self.x.at[pl.ds(first + group * BLOCK, BLOCK), inner]
                    place = shared["x"].at[slot, pl.ds(group * BLOCK, BLOCK)]
                    plgpu.copy_gmem_to_smem(block, place, loaded, collective_axes=together["x"])

                @pl.when(group >= blocks)
                def _() -> None:
                    plgpu.barrier_arrive(loaded)

            for i, part in enumerate(parts):
                place = shared["w"].at[slot, pl.ds(i * self.channels, self.channels)]
                source = self.weights.at[(*part, channels, inner)]
                plgpu.copy_gmem_to_smem(source, place, loaded, collective_axes=together["weights"])

    def wait_for_readers(self) -> None:
        """Until all that was copied has been read."""
        end = self.turns * self.steps

        @pl.loop(jnp.maximum(end - self.plan.stages, 0), end)
        def _(at: jax.Array) -> None:
            plgpu.barrier_wait(self.shared["read"].at[lax.rem(at, jnp.int32(self.plan.stages))])

    def multiply(
        self, group: int, turn: jax.Array, _: jax.Array, first: jax.Array, blocks: jax.Array, channel: jax.Array
    ) -> None:
        """What one of the groups that multiply does with a turn's tile: its block of rows, if there is one."""
        shared = self.shared

        @pl.when(group < blocks)
        def _multiply() -> None:
            def sums(acc: Any) -> jax.Array:
                @pl.loop(0, self.steps)
                def _(step: jax.Array) -> None:
                    slot = self.slot(turn, step)
                    plgpu.barrier_wait(shared["loaded"].at[slot])
                    x = shared["x"].at[slot, pl.ds(group * BLOCK, BLOCK)]
                    plgpu.wgmma(acc, x, shared["w"].at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # until the product before this one is done

                    @pl.when(step > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(shared["read"].at[self.slot(turn, step - 1)])

                return acc[...]

            acc = pl.run_scoped(sums, plgpu.ACC((BLOCK, WIDTH), jnp.float32))
            plgpu.barrier_arrive(shared["read"].at[self.slot(turn, jnp.int32(self.steps - 1))])
            self.write(group, acc, first + group * BLOCK, channel)

        @pl.when(group >= blocks)
        def _keep_in_step() -> None:
            @pl.loop(0, self.steps)
            def _(step: jax.Array) -> None:
                slot = self.slot(turn, step)
                plgpu.barrier_wait(shared["loaded"].at[slot])
                # One thread arrives for all, whom products keep together; here this does, or one that is late by the
                # whole ring would take the next turn's tile for this one's, and wait for good.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared["read"].at[slot])

    def write(self, group: int, acc: jax.Array, first: jax.Array, channel: jax.Array) -> None:
        """Writes the sums of a block of rows, of the channels that there are."""
        rows = pl.ds(first, BLOCK)
        if self.gated:
            gate, up, place = acc[:, : self.channels], acc[:, self.channels :], self.shared["out"].at[group]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            place[...] = (gate * jax.nn.sigmoid(gate) * up).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, self.out.at[rows, pl.ds(channel, self.channels)])
            return
        for i in range(0, WIDTH, INNER):

            def write(i: int = i) -> None:
                self.out.at[rows, pl.ds(channel + i, INNER)][...] = acc[:, i : i + INNER]

            pl.when(channel + i < self.out.shape[1])(write)
