"""What a model needs on a mesh of a machine and what bounds its speed: bytes, collectives, FLOPs, a roofline.

Bytes of arguments are exact: those of the shards of abstract arrays. Collectives are those in the jaxpr of the step.
Temporaries are an estimate (`m1jax.sharding.liveness`) unless the compiler is asked (`m1jax.sharding.compiling`).
FLOPs are the model's own: those of a decode step of one row, counted, at every position, so that padding and blocks
computed in vain count for nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.model import abstract
from m1jax.sharding.flops import Collective, Cost, cost_of, count
from m1jax.sharding.liveness import temporaries_of
from m1jax.sharding.machines import Device
from m1jax.sharding.mesh import AXES, MeshShape, abstract_mesh, factorings
from m1jax.sharding.rules import check, shards
from m1jax.sharding.sizes import tree_bytes
from m1jax.sharding.steps import Workload, make_step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device; `temporaries` is an estimate where `compiled` is None, else what that compiler says."""

    parameters: int
    optimizer: int
    cache: int
    state: int  # of lightning attention
    temporaries: int
    compiled: str | None = None

    @property
    def arguments(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.optimizer + self.cache + self.state

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries

    def fits(self, room: float) -> bool:
        """Whether that is no more than so many bytes."""
        return self.total <= room


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A collective in a step: how often, the bytes each device sends in all, and whether they leave the node."""

    collective: Collective
    times: float
    between_nodes: bool

    @property
    def sent(self) -> float:
        """Bytes."""
        return self.times * self.collective.sent


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step takes at least: arithmetic, reading memory, and sending, each at the data sheet's speed."""

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest, as if all three overlapped."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Which that is."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result; `largest_batch` and `longest_context` are None where not even the parameters fit."""

    mesh: MeshShape
    work: Workload
    device: Device
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops: float  # of the whole step on all devices
    roofline: Roofline
    largest_batch: int | None
    longest_context: int | None

    @property
    def fits(self) -> bool:
        """Whether a device has room."""
        return self.memory.fits(self.device.memory)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, at the roofline."""
        return self.work.rows * self.work.tokens / self.roofline.seconds


def make_plan(config: M1Config, work: Workload, mesh: MeshShape, device: Device) -> Plan:
    """Plans a step.

    Raises:
      UserError: the mesh does not divide the model or the rows.
    """
    axes = abstract_mesh(mesh, work.use)
    check(config, axes)
    work = dataclasses.replace(work, batch=work.batch or shards(axes, "batch"))
    check_rows(work, mesh)
    memory, cost = measure(config, work, mesh)
    flops = model_flops(config, work)
    traffic = tuple(
        Traffic(collective, times, _leaves_node(collective.axes, mesh, work, device))
        for collective, times in sorted(cost.collectives.items(), key=lambda item: -item[1] * item[0].sent)
    )
    seconds = sum(t.sent / (device.network if t.between_nodes else device.link) for t in traffic)
    read = bytes_read(config, work, mesh, memory)
    roofline = Roofline(flops / mesh.size / device.flops, read / device.bandwidth, seconds)
    batch, context = limits(config, work, mesh, device, memory)
    return Plan(mesh, work, device, memory, traffic, flops, roofline, batch, context)


def best(config: M1Config, work: Workload, count: int, device: Device) -> Plan | None:
    """Of all meshes of so many devices that have room, the one with most tokens per second; None if none has.

    Where the workload leaves the batch open, each mesh gets the largest that fits.
    """
    plans = []
    for mesh in factorings(count, work.use):
        axes = abstract_mesh(mesh, work.use)
        try:
            check(config, axes)
            smallest = dataclasses.replace(work, batch=work.batch or shards(axes, "batch"))
            if not arguments(config, smallest, mesh, 0).fits(device.memory):
                continue
            plan = make_plan(config, smallest, mesh, device)
            if work.batch is None and plan.largest_batch:
                plan = make_plan(config, dataclasses.replace(work, batch=plan.largest_batch), mesh, device)
        except UserError:  # does not divide the model or the rows
            continue
        plans.append(plan)
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.tokens_per_second, default=None)


def check_rows(work: Workload, mesh: MeshShape) -> None:
    """Raises `UserError` if rows, tokens or cache do not divide."""
    axes = abstract_mesh(mesh, work.use)
    for size, axis, name in (
        (work.rows, "batch", "batch"),
        (work.tokens if work.mode != "serve" else 0, "sequence", "tokens"),
        (work.context, "cache", "context"),
    ):
        ways = shards(axes, axis)
        if size % ways:
            raise UserError(f"{name} {size} is not a multiple of {ways}, the ways mesh {mesh} splits it")


@functools.lru_cache(maxsize=256)
def measure(config: M1Config, work: Workload, mesh: MeshShape) -> tuple[Memory, Cost]:
    """Bytes on each device, and the cost of a step with its collectives."""
    axes = abstract_mesh(mesh, work.use)
    step = make_step(config, work, axes)
    with jax.sharding.use_abstract_mesh(axes):
        jaxpr = jax.make_jaxpr(step.function)(*step.arguments).jaxpr
    return arguments(config, work, mesh, temporaries_of(jaxpr, mesh.size)), cost_of(jaxpr)


def arguments(config: M1Config, work: Workload, mesh: MeshShape, temporary: int) -> Memory:
    """Bytes on each device, with so many of temporaries."""
    axes = abstract_mesh(mesh, work.use)
    if work.mode == "train":
        parameters = sum(tree_bytes(config, axes, abstract(config, "float32")).values())
        return Memory(parameters, 2 * parameters, 0, 0, temporary)
    model = abstract(config, work.dtype, work.quantize)
    parameters = sum(tree_bytes(config, axes, model).values())
    state = tree_bytes(config, axes, jax.eval_shape(lambda m: m.init_state(work.rows, work.context), model))
    lightning = state.pop("lightning.s")
    return Memory(parameters, 0, sum(state.values()), lightning, temporary)


def model_flops(config: M1Config, work: Workload) -> float:
    """FLOPs of a step on all devices; of a training step forward, backward, and forward again (remat)."""
    model = abstract(config, "float32")

    def one(context: int) -> float:
        state = jax.eval_shape(lambda m: m.init_state(1, context), model)
        return count(lambda m, s, t: m.step(t, s), model, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).flops

    low, high = sorted({min(1024, config.max_position_embeddings // 2), min(2048, config.max_position_embeddings)})
    slope = (one(high) - one(low)) / (high - low)
    start = one(low) - slope * low
    T, N = work.tokens, work.context
    rows = T * (start + slope * (N - T / 2)) if work.mode != "serve" else start + slope * N
    if work.mode == "prefill":  # logits of the last token only
        rows -= (T - 1) * 2 * config.hidden_size * config.vocab_size
    return work.rows * rows * (4 if work.mode == "train" else 1)


def bytes_read(config: M1Config, work: Workload, mesh: MeshShape, memory: Memory) -> float:
    """Bytes that a device moves at least: weights in use, cache, states; in training weights, gradients, moments.

    Experts are read that some token chooses, if all are chosen equally often. Activations are left out.
    """
    if work.mode == "train":
        # Forward, remat and backward read the weights; the update reads and writes weights and moments.
        return 3 * memory.parameters + 3 * (memory.parameters + memory.optimizer)
    sizes = tree_bytes(config, abstract_mesh(mesh, work.use), abstract(config, work.dtype, work.quantize))
    experts = sum(size for path, size in sizes.items() if path.startswith(("moe.gate_up", "moe.down")))
    tokens = work.rows * work.tokens / mesh.data
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** tokens
    embedding = sizes["embed"] if "lm_head" in sizes else 0  # a few rows of it
    return memory.parameters - experts * missed - embedding + memory.cache + 2 * memory.state


def _leaves_node(axes: tuple[str, ...], mesh: MeshShape, work: Workload, device: Device) -> bool:
    """Whether the devices of a group are on several nodes: the last axis of the mesh is innermost."""
    span, stride = 1, 1
    for axis in reversed(AXES[work.use]):
        size = getattr(mesh, axis)
        if axis in axes and size > 1:
            span = stride * size
        stride *= size
    return span > device.node


def limits(
    config: M1Config, work: Workload, mesh: MeshShape, device: Device, memory: Memory
) -> tuple[int | None, int | None]:
    """The largest batch at this context and the longest context at this batch."""
    axes = abstract_mesh(mesh, work.use)
    rows = shards(axes, "batch")
    positions = math.lcm(shards(axes, "cache"), shards(axes, "sequence"), math.gcd(work.context, 1024))

    def batches(n: int) -> Workload:
        return dataclasses.replace(work, batch=n * rows)

    def contexts(n: int) -> Workload:
        return dataclasses.replace(work, context=n * positions)

    here = work.rows // rows, work.context // positions
    top = 1 << 20, config.max_position_embeddings // positions
    batch = _largest(config, mesh, device, memory, batches, here[0], top[0], memory.cache + memory.state)
    context = _largest(config, mesh, device, memory, contexts, here[1], top[1], memory.cache)
    return batch and batch * rows, context and context * positions


def _largest(
    config: M1Config,
    mesh: MeshShape,
    device: Device,
    memory: Memory,
    resized: Callable[[int], Workload],
    here: int,
    top: int,
    growing: int,
) -> int | None:
    """The largest n up to `top` whose workload fits, where at n = `here` as much as `memory` is needed.

    The `growing` bytes of it are proportional to n; temporaries grow as their estimate from `here` to twice that.
    """
    slope = growing / here
    twice = min(2 * here, top)
    if twice > here:
        estimates = [measure(config, resized(n), mesh)[0].temporaries for n in (here, twice)]
        slope += max(0, estimates[1] - estimates[0]) / (twice - here)
    n = top if slope == 0 else int(here + (device.memory - memory.total) / slope)
    return min(n, top) if n >= 1 else None
