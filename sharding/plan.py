"""What a model needs on a mesh of a machine and what bounds its speed: bytes, collectives, FLOPs, a roofline.

Bytes of arguments are exact: those of the shards of abstract arrays. Collectives are those in the jaxpr of the step.
Temporaries are an estimate (`m1jax.sharding.liveness`) unless the compiler is asked (`m1jax.sharding.compiling`).
FLOPs are the model's own: those of a decode step of one row, counted, at every position, so that padding and blocks
computed in vain count for nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from m1jax.config import SOFTMAX, M1Config
from m1jax.errors import UserError
from m1jax.model import abstract
from m1jax.sharding.flops import Collective, Cost, cost_of, count
from m1jax.sharding.liveness import temporaries_of
from m1jax.sharding.machines import Device
from m1jax.sharding.mesh import AXES, MeshShape, abstract_mesh, factorings
from m1jax.sharding.rules import check, shards
from m1jax.sharding.sizes import tree_bytes
from m1jax.sharding.steps import Workload, make_step, trained

TOP_BATCH = 1 << 20  # no plan goes beyond
# What compilers have needed of temporaries, as multiples of the estimate, least and most: for an H200 0.35 (training
# on 8 devices) to 1.1 (factors on 8), but next to nothing of a decode step, whose kernels copy nothing; for TPUs, which
# lay arrays out in tiles, up to 7 (a prompt on a mesh with `seq`).
OFF = {"cuda": (0.35, 1.1), "tpu": (0.35, 7.0)}


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
    """A collective in a step: how often it runs, and how many devices of a group are on one node."""

    collective: Collective
    times: float
    nearby: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all."""
        return self.times * self.collective.sent

    @property
    def between_nodes(self) -> bool:
        """Whether some of them leave the node."""
        return self.nearby < self.collective.devices

    def seconds(self, device: Device) -> float:
        """The least time: what leaves a node is shared out among its adapters, unless each device sends its own."""
        n, m = self.collective.devices, self.nearby
        if not self.between_nodes:
            return self.sent / device.link
        if self.collective.kind == "ppermute":
            return self.sent / device.network
        if self.collective.kind == "all_to_all":
            return max(self.sent / device.link, self.sent * (n - m) / (n - 1) / device.network)
        return max(self.sent / device.link, self.sent / m / device.network)


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
    """The result; `largest_batch` and `longest_context` are None where nothing fits, and to within 1%."""

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
    def off(self) -> tuple[float, float]:
        """Between which multiples of them the temporaries may turn out."""
        if self.memory.compiled:
            return 1.0, 1.0
        least, most = OFF[self.device.platform]
        return (0.0 if self.device.platform == "cuda" and self.work.mode == "serve" else least), most

    @property
    def sure(self) -> bool:
        """Whether that does not hang on how far the estimate of the temporaries is off."""
        needed = (self.memory.arguments + self.memory.temporaries * off for off in self.off)
        return len({size <= self.device.memory for size in needed}) == 1

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
    check(config, axes, work.quantize)
    work = dataclasses.replace(work, batch=work.batch or shards(axes, "batch"))
    check_rows(work, mesh)
    return _with_limits(config, _without_limits(config, work, mesh, device))


def compiled_plan(config: M1Config, plan: Plan, temporaries: int, compiler: str) -> Plan:
    """The plan with what a compiler says of the temporaries; the limits take the estimates in proportion to it."""
    memory = dataclasses.replace(plan.memory, temporaries=temporaries, compiled=compiler)
    return _with_limits(config, dataclasses.replace(plan, memory=memory))


def _without_limits(config: M1Config, work: Workload, mesh: MeshShape, device: Device) -> Plan:
    memory, cost = measure(config, work, mesh)
    flops = model_flops(config, work)
    traffic = tuple(
        Traffic(collective, times, _nearby(collective.axes, mesh, work, device))
        for collective, times in sorted(cost.collectives.items(), key=lambda item: -item[1] * item[0].sent)
    )
    seconds = sum(t.seconds(device) for t in traffic)
    read = bytes_read(config, work, mesh, memory)
    roofline = Roofline(flops / mesh.size / device.flops, read / device.bandwidth, seconds)
    return Plan(mesh, work, device, memory, traffic, flops, roofline, None, None)


def _with_limits(config: M1Config, plan: Plan) -> Plan:
    batch, context = _largest_batch(config, plan), _longest_context(config, plan)
    return dataclasses.replace(plan, largest_batch=batch, longest_context=context)


def best(config: M1Config, work: Workload, count: int, device: Device) -> Plan | None:
    """Of the meshes of so many devices that have room, the one with most tokens per second; None if none has.

    Where the workload leaves the batch open, each mesh gets about the largest that fits. Of meshes that differ only in
    the size of `expert`, those after the first that is slower than the one before are not looked at.
    """
    found = _best(config, work, factorings(count, work.use, sequence=work.mode != "serve"), device)
    if found is None and work.mode == "serve":  # where rows or memory are too few, the cache can be split
        found = _best(config, work, factorings(count, work.use, sequence=True), device)
    return found


def _best(config: M1Config, work: Workload, meshes: Iterable[MeshShape], device: Device) -> Plan | None:
    lines: dict[tuple[int, int], list[tuple[float, MeshShape]]] = {}
    for mesh in meshes:
        if _possible(config, work, mesh, device):
            bound = _speed_without_sending(config, work, mesh, device)
            lines.setdefault((mesh.seq, mesh.tensor), []).append((bound, mesh))
    # With the batch open more rows do what a split sequence does.
    stages = [1, *sorted({seq for seq, _ in lines} - {1})] if work.batch is None else [None]
    top = None
    for stage in stages:
        of_stage = [line for (seq, _), line in lines.items() if stage in (None, seq)]
        for line in sorted(of_stage, key=lambda line: max(bound for bound, _ in line), reverse=True):
            top = _climb(config, work, line, device, top)
        if top is not None:
            break
    if top is None:
        return None
    if work.batch is None and (batch := _largest_batch(config, top)):
        larger = _without_limits(config, dataclasses.replace(work, batch=batch), top.mesh, device)
        top = larger if larger.fits else top
    return _with_limits(config, top)


def _possible(config: M1Config, work: Workload, mesh: MeshShape, device: Device) -> bool:
    """Whether a mesh divides the model and the rows, has room for its arguments, and needs the sequence split."""
    axes = abstract_mesh(mesh, work.use)
    smallest = dataclasses.replace(work, batch=work.batch or shards(axes, "batch"))
    try:
        check(config, axes, work.quantize)
        check_rows(smallest, mesh)
    except UserError:
        return False
    kept = 0
    if work.mode == "train":  # the input of every layer
        tokens = smallest.rows * work.tokens // shards(axes, "batch") // shards(axes, "sequence")
        kept = tokens * config.num_hidden_layers * config.hidden_size * jnp.dtype(work.dtype).itemsize
    return arguments(config, smallest, mesh, kept).fits(device.memory) and not _has_more_rows(work, mesh)


def _has_more_rows(work: Workload, mesh: MeshShape) -> bool:
    """Whether `expert` could split rows where `seq` splits sequences: as many bytes, and less to send."""
    now = shards(abstract_mesh(mesh, work.use), "batch")
    for part in (n for n in range(2, mesh.seq + 1) if mesh.seq % n == 0):
        other = dataclasses.replace(mesh, seq=mesh.seq // part, expert=mesh.expert * part)
        rows = shards(abstract_mesh(other, work.use), "batch")
        if work.batch is not None and rows > now and work.batch % rows == 0:
            return True
    return False


def _speed_without_sending(config: M1Config, work: Workload, mesh: MeshShape, device: Device) -> float:
    """Tokens per second if nothing were sent and there were no temporaries: no plan of this mesh has more."""
    rows = shards(abstract_mesh(mesh, work.use), "batch")
    work = dataclasses.replace(work, batch=work.batch or rows * _multiple(config, work, rows, mesh, device))
    read = bytes_read(config, work, mesh, arguments(config, work, mesh, 0))
    flops = model_flops(config, work) / mesh.size
    return work.rows * work.tokens / max(flops / device.flops, read / device.bandwidth)


def _multiple(
    config: M1Config, work: Workload, rows: int, mesh: MeshShape, device: Device, memory: Memory | None = None
) -> int:
    """How many times so many rows fit, if all but the parameters grew with them; `memory` is theirs."""
    memory = memory or arguments(config, dataclasses.replace(work, batch=rows), mesh, 0)
    fixed = memory.parameters + memory.optimizer
    return max(1, min(TOP_BATCH, int((device.memory - fixed) / max(1, memory.total - fixed))))


def _climb(
    config: M1Config, work: Workload, line: list[tuple[float, MeshShape]], device: Device, top: Plan | None
) -> Plan | None:
    """The fastest of `top` and the plans, without limits, of meshes up to the first slower than the one before."""
    before = 0.0
    # In training a device of `expert` gathers fewer weights, in serving one of `data` exchanges fewer tokens.
    for bound, mesh in sorted(line, key=lambda item: item[1].expert, reverse=work.mode == "train"):
        if top is not None and bound <= top.tokens_per_second:
            continue
        rows = shards(abstract_mesh(mesh, work.use), "batch")
        plan = _without_limits(config, dataclasses.replace(work, batch=work.batch or rows), mesh, device)
        if work.batch is None and plan.fits:
            batch = rows * _multiple(config, work, rows, mesh, device, plan.memory)
            larger = _without_limits(config, dataclasses.replace(work, batch=batch), mesh, device)
            plan = larger if larger.fits else plan
        speed = plan.tokens_per_second if plan.fits else 0.0
        if speed < before:
            break
        before = speed
        if plan.fits and (top is None or speed > top.tokens_per_second):
            top = plan
    return top


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
    alive, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # a compiler leaves out what nobody reads
    return arguments(config, work, mesh, temporaries_of(jaxpr, mesh.size)), cost_of(alive)


def arguments(config: M1Config, work: Workload, mesh: MeshShape, temporary: int) -> Memory:
    """Bytes on each device, with so many of temporaries."""
    axes = abstract_mesh(mesh, work.use)
    if work.mode == "train":
        updated, base, _ = trained(config, work)
        own = sum(tree_bytes(config, axes, updated).values())
        held = 0 if base is None else sum(tree_bytes(config, axes, base.model).values())
        return Memory(held + own, 2 * own, 0, 0, temporary)
    model = abstract(config, work.dtype, work.quantize)
    parameters = sum(tree_bytes(config, axes, model).values())
    state = tree_bytes(config, axes, jax.eval_shape(lambda m: m.init_state(work.rows, work.context), model))
    lightning = state.pop("lightning.s")
    return Memory(parameters, 0, sum(state.values()), lightning, temporary)


def model_flops(config: M1Config, work: Workload) -> float:
    """FLOPs of a step on all devices; of a training step forward, backward, and forward again (remat).

    Where factors are trained the weights have no gradient, which is half of backward; the factors are left out.
    """
    model = abstract(config, "float32")

    def one(context: int) -> float:
        state = jax.eval_shape(lambda m: m.init_state(1, context), model)
        return count(lambda m, s, t: m.step(t, s), model, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).flops

    low, high = sorted({min(1024, config.max_position_embeddings // 2), min(2048, config.max_position_embeddings)})
    slope = (one(high) - one(low)) / (high - low)
    start = one(low) - slope * low
    T, N = work.tokens, work.context
    rows = T * (start + slope * (N - T / 2)) if work.mode != "serve" else start + slope * N
    if work.mode == "prefill":  # of the last token only: the logits and most of the last layer
        spared = config.hidden_size * (config.vocab_size + 3 * config.num_experts_per_tok * config.intermediate_size)
        if config.layer_types[-1] == SOFTMAX:
            spared += 2 * config.hidden_size * config.num_attention_heads * config.head_dim
            rows -= (T - 1) * slope * (N - T / 2) / len(config.softmax_layers)
        rows -= (T - 1) * 2 * spared
    passes = {"train": 3 if work.lora_rank else 4}.get(work.mode, 1)
    return work.rows * rows * passes


def bytes_read(config: M1Config, work: Workload, mesh: MeshShape, memory: Memory) -> float:
    """Bytes that a device moves at least: weights in use, cache, states; in training weights, gradients, moments.

    Experts are read that some token chooses, if all are chosen equally often; layers come one after the other, and in
    each all wait for the device with the most of these. Activations are left out.
    """
    if work.mode == "train":
        # Forward, remat and backward read the weights; the update reads and writes what is trained, and two moments.
        return 3 * memory.parameters + 3 * 1.5 * memory.optimizer
    sizes = tree_bytes(config, abstract_mesh(mesh, work.use), abstract(config, work.dtype, work.quantize))
    experts = sum(size for path, size in sizes.items() if path.startswith(("moe.gate_up", "moe.down")))
    tokens = work.rows * work.tokens / mesh.data
    groups = shards(abstract_mesh(mesh, work.use), "experts")
    most = busiest(config.num_local_experts, config.num_experts_per_tok, groups, round(tokens))
    idle = 1 - most * groups / config.num_local_experts
    embedding = sizes["embed"] if "lm_head" in sizes else 0  # a few rows of it
    return memory.parameters - experts * idle - embedding + memory.cache + 2 * memory.state


@functools.lru_cache(maxsize=256)
def busiest(experts: int, chosen: int, groups: int, tokens: int) -> float:
    """How many different experts tokens choose in the group of devices where these are the most, on average.

    By 200 draws of a fixed seed; where an expert is left out once in a million draws, all of them.
    """
    if experts * (1 - chosen / experts) ** tokens < 1e-6:
        return experts / groups
    rng = np.random.default_rng(0)
    found = np.zeros((200, experts), bool)
    for draw in found:
        order = np.argsort(rng.random((max(tokens, 1), experts)), axis=1)
        draw[order[:, :chosen]] = True
    return float(found.reshape(200, groups, -1).sum(-1).max(-1).mean())


def _nearby(axes: tuple[str, ...], mesh: MeshShape, work: Workload, device: Device) -> int:
    """How many devices of a group are on the same node: the last axis of the mesh is innermost."""
    nearby, stride = 1, 1
    for axis in reversed(AXES[work.use]):
        size = getattr(mesh, axis)
        if axis in axes:
            nearby *= min(size, max(1, device.node // stride))
        stride *= size
    return nearby


def _largest_batch(config: M1Config, plan: Plan) -> int | None:
    """The largest batch at the plan's context."""
    rows = shards(abstract_mesh(plan.mesh, plan.work.use), "batch")
    needed = _needed(config, plan, lambda n: dataclasses.replace(plan.work, batch=n * rows))
    n = _largest(needed, plan.work.rows // rows, TOP_BATCH // rows, plan.device.memory)
    return n * rows or None


def _longest_context(config: M1Config, plan: Plan) -> int | None:
    """The longest context at the plan's batch."""
    work, axes = plan.work, abstract_mesh(plan.mesh, plan.work.use)
    step = math.lcm(shards(axes, "cache"), shards(axes, "sequence"), math.gcd(work.context, 1024))
    needed = _needed(config, plan, lambda n: dataclasses.replace(work, context=n * step))
    n = _largest(needed, work.context // step, config.max_position_embeddings // step, plan.device.memory)
    return n * step or None


def _needed(config: M1Config, plan: Plan, resized: Callable[[int], Workload]) -> Callable[[int], float]:
    """Bytes of a workload of size n; of temporaries the estimate, scaled to a compiler's figure for `plan` if any."""
    estimate = measure(config, plan.work, plan.mesh)[0].temporaries
    scale = plan.memory.temporaries / estimate if plan.memory.compiled and estimate else 1.0

    def needed(n: int) -> float:
        if n == 0:
            return plan.memory.parameters + plan.memory.optimizer
        memory = measure(config, resized(n), plan.mesh)[0]
        return memory.arguments + scale * memory.temporaries

    return needed


def _largest(needed: Callable[[int], float], here: int, top: int, room: float) -> int:
    """The largest n up to `top` with needed(n) <= room, or one that fits where one 1% larger does not; 0 if none.

    `needed` takes a moment and is nearly linear: the next n is where the line through the two n tried that come
    nearest to the room meets it.
    """
    tried = {0: needed(0)}
    low, high = 0, top + 1  # the largest known to fit, the smallest not to
    n = min(here, top)
    while tried[0] <= room and high - low > 1 + low // 100:
        tried[n] = needed(n)
        low, high = (n, high) if tried[n] <= room else (low, n)
        step = 1 + low // 100
        (a, at_a), (b, at_b) = sorted(tried.items(), key=lambda item: abs(item[1] - room))[:2]
        slope = (at_b - at_a) / (b - a)
        guess = math.floor(a + (room - at_a) / slope) if slope > 0 else high
        # Where the line says that low is the largest, the next one tells whether it is.
        n = min(high - 1, max(low + step, guess)) if len(tried) < 9 else (low + high) // 2
    return low
