"""The mixture of experts on a mesh: each device holds some experts, or a slice of their width, or both.

Three forms, chosen by where the tokens are:

- *Everywhere*: the devices that share out the experts read the same tokens. Each computes what its experts add; the
  parts are summed.
- *Few*, different tokens on each device: they are gathered, computed as above, and the sums scattered back. With few
  tokens latency counts, not bytes.
- *Many*: each token's row travels to its experts' devices and the result back, by two ragged all-to-alls. No token
  is dropped, however the router chooses.

Memory of the exchange: with A = tokens · k rows to send (of at most `CHUNK` tokens at a time), a device receives at
most R = SLACK · A rows in one round. Loads beyond that take further rounds, of which all but the first are skipped when
nothing is left: the buffers are A + R rows whatever the number of devices n, where one round for the worst case would
need n · A.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from m1jax.kernels import experts as kernel
from m1jax.kernels.experts.order import by_bucket
from m1jax.kernels.rounding import mapped, rounded
from m1jax.sharding.flops import ONCE
from m1jax.sharding.region import Axes, every_axis, index, size_of, split_over

CHUNK = 8192  # tokens of one device whose rows travel, or are computed, at once
FEW = 512  # tokens of all devices up to which they are gathered: 6 MB of bfloat16 in M1
SLACK = 1.25  # rows that a device receives at most in one round, as a multiple of those it sends
Stacks = tuple[Any, Any]  # gate_up and down of this device's experts


def experts(
    x: jax.Array, gate_up: Any, down: Any, chosen: jax.Array, weights: jax.Array, *, layer: jax.Array | int = 0
) -> jax.Array:
    """As the kernel of this name, in the dtype of x: x `[N, M]`, chosen and weights `[N, k]` are this device's tokens.

    Args:
      x: `[N, M]`.
      gate_up, down: this device's experts; E is their number here.
      chosen: int32 `[N, k]`, numbered over all devices; the number of all experts is nobody.
      weights: float32 `[N, k]`.
      layer: which layer of the stacks.
    """
    group, width = split_over("experts"), split_over("expert_width")
    if not group and not width:
        return rounded(kernel.experts(x, gate_up, down, chosen, weights, layer=layer), x.dtype)
    different = split_over("batch") + split_over("sequence")
    apart = tuple(axis for axis in group if axis in different)  # axes of the group along which tokens differ
    together = tuple(axis for axis in group if axis not in different)
    stacks: Stacks = (gate_up, down)
    if not apart:
        y = _by_chunks(functools.partial(_own, group, layer), stacks, x, chosen, weights)
    elif x.shape[0] * size_of(apart) <= FEW:
        everyone = (lax.all_gather(a, apart, tiled=True) for a in (x, chosen, weights))
        y = lax.psum_scatter(_own(group, layer, stacks, *everyone), apart, tiled=True)
    else:
        places = Places(group, apart, together, gate_up.shape[1])
        y = _by_chunks(functools.partial(_exchanged, places, layer), stacks, x, chosen, weights)
    rest = together + width
    return lax.psum(y, rest) if rest else y


def _by_chunks(function: Callable[..., jax.Array], stacks: Stacks, *arrays: jax.Array) -> jax.Array:
    """`function(stacks, *arrays)` of arrays `[N, ...]`, at most `CHUNK` rows at a time."""
    N = arrays[0].shape[0]
    n = -(-N // CHUNK)
    if n == 1:
        return function(stacks, *arrays)
    size = -(-N // n)

    def chunks(x: jax.Array) -> jax.Array:
        # Rows of padding repeat the first: what they give is cut off again.
        padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (n * size - N, *x.shape[1:]))])
        return padded.reshape(n, size, *x.shape[1:])

    out = mapped(lambda stacks, parts: function(stacks, *parts), stacks, tuple(map(chunks, arrays)))
    return out.reshape(n * size, -1)[:N]


def _own(
    group: Axes, layer: jax.Array | int, stacks: Stacks, x: jax.Array, chosen: jax.Array, weights: jax.Array
) -> jax.Array:
    """What this device's experts add for tokens `[N, M]`."""
    E = stacks[0].shape[1]
    here = chosen - index(group) * E
    here = jnp.where((here >= 0) & (here < E), here, E)
    return rounded(kernel.experts(x, *stacks, here, weights, layer=layer), x.dtype)


class Places(NamedTuple):
    """Where experts are: `group` are the mesh axes they are split over, E on each device.

    Tokens differ along the axes `apart`; along `together` they are the same, and each device sends those rows only
    whose experts have its own place along them.
    """

    group: Axes
    apart: Axes
    together: Axes
    E: int

    def owner(self, chosen: jax.Array) -> jax.Array:
        """The index along `apart` of the device that a row is sent to; their number where it is not sent at all."""
        place, at = chosen // self.E, {}
        for axis in reversed(self.group):
            at[axis] = place % size_of((axis,))
            place = place // size_of((axis,))
        sent = place == 0  # else the expert is nobody
        for axis in self.together:
            sent &= at[axis] == index((axis,))
        target = jnp.zeros_like(chosen)
        for axis in self.apart:
            target = target * size_of((axis,)) + at[axis]
        return jnp.where(sent, target, size_of(self.apart))


class Route(NamedTuple):
    """One way of an exchange, int32 `[n]` each: with device i, as `lax.ragged_all_to_all` wants them."""

    start: jax.Array  # first row of what goes to i
    sent: jax.Array  # number of rows
    target: jax.Array  # where it begins there
    received: jax.Array  # number of rows from i


def _exchanged(
    places: Places,
    layer: jax.Array | int,
    stacks: Stacks,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """What experts anywhere along `apart` add for this device's tokens `[N, M]`."""
    (N, k), (E, n) = chosen.shape, (places.E, size_of(places.apart))
    A = N * k
    flat = chosen.reshape(-1)
    owner = places.owner(flat)
    local = jnp.where(owner < n, flat % E, E)
    order, place, per_expert = by_bucket(jnp.where(owner < n, owner * E + local, n * E), n * E)
    rows, numbers = x[order // k], local[order]
    counts = lax.all_gather(jnp.sum(per_expert.reshape(n, E), axis=1), places.apart)  # [from, to]
    # The same on all devices, so that they take part in the same exchanges.
    rounds = jnp.maximum(-(-jnp.max(jnp.sum(counts, axis=0)) // _limit(A)), 1)
    rounds = lax.pmax(rounds, every_axis())
    y: Any = _all_rounds(places, rows, stacks, layer, numbers, counts, rounds)
    parts = y[place].reshape(N, k, -1).astype(jnp.float32)
    return rounded(jnp.einsum("nkm,nk->nm", parts, weights, precision="highest"), x.dtype)


def _one_round(
    places: Places,
    step: jax.Array,
    rows: jax.Array,
    stacks: Stacks,
    layer: jax.Array | int,
    numbers: jax.Array,
    counts: jax.Array,
    rounds: jax.Array,
) -> jax.Array:
    """Results `[A, M]` for the share of the rows that travels in this round, zeros for the others."""
    (A, _), (E, n) = rows.shape, (places.E, size_of(places.apart))
    there, back = _routes(counts, rounds, index(places.apart), step)
    R = _limit(A) + n  # a share that is rounded takes a row more
    received: Any = exchange(rows, there, back, (A, R), places.apart)
    expert = _travel(numbers + 1, there, R, places.apart) - 1  # 0 where nothing came
    nobody = jnp.where(expert < 0, E, expert)[:, None]
    y = kernel.experts(received, *stacks, nobody, jnp.ones(nobody.shape, jnp.float32), layer=layer)
    out: Any = exchange(rounded(y, rows.dtype), back, there, (R, A), places.apart)
    return out


def _limit(A: int) -> int:
    """The most rows a device receives in one round."""
    return math.ceil(SLACK * A)


def _sum_rounds(places: Places, A: int, rounds: jax.Array, part: Callable[[jax.Array], Any]) -> Any:
    """The sum of `part(step)` over all rounds."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, jnp.int32(0)))

    def more(sums: Any, step: jax.Array) -> Any:
        return jax.tree.map(jnp.add, sums, part(step))

    def body(sums: Any, step: jax.Array) -> tuple[Any, None]:
        return lax.cond(step < rounds, more, lambda sums, _: sums, sums, step), None

    most = -(-size_of(places.apart) * A // _limit(A))
    with jax.named_scope(ONCE):
        return lax.scan(body, zeros, jnp.arange(most))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(places: Places, rows: jax.Array, stacks: Stacks, *rest: jax.Array) -> jax.Array:
    """Results `[A, M]` of `rows` `[A, M]`; `rest` as in `_one_round`."""
    return _sum_rounds(places, rows.shape[0], rest[-1], lambda step: _one_round(places, step, rows, stacks, *rest))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Constant:
    """Which stacks have no gradient: those that are quantised, and those that nobody trains."""

    stacks: tuple[bool, ...]


def _all_rounds_fwd(places: Places, rows: Any, stacks: Any, *rest: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    constant = _Constant(tuple(not (isinstance(w, CustomVJPPrimal) and w.perturbed) for w in stacks))
    rows, stacks, *rest = jax.tree.map(lambda x: x.value, (rows, stacks, *rest))
    return _all_rounds(places, rows, stacks, *rest), (rows, stacks, rest, constant)


def _all_rounds_bwd(places: Places, residuals: tuple[Any, ...], d_y: jax.Array) -> tuple[Any, ...]:
    """Each round once more, with its gradient; of weights that have one only this layer's take part."""
    rows, stacks, (layer, *rest), constants = residuals
    constant, one, at = constants.stacks, stacks, layer
    if not all(constant):
        one, at = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, keepdims=True), stacks), 0

    def part(step: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        def run(rows: jax.Array, trained: list[jax.Array]) -> jax.Array:
            left = iter(trained)
            whole: Any = tuple(w if fixed else next(left) for w, fixed in zip(one, constant, strict=True))
            return _one_round(places, step, rows, whole, at, *rest)

        trained = [w for w, fixed in zip(one, constant, strict=True) if not fixed]
        d_rows, d_trained = jax.vjp(run, rows, trained)[1](d_y)
        return d_rows, [d.astype(jnp.float32) for d in d_trained]  # of every round

    d_rows, d_trained = _sum_rounds(places, rows.shape[0], rest[-1], part)
    left = iter(d_trained)
    d_stacks = tuple(
        None if fixed else lax.dynamic_update_slice_in_dim(jnp.zeros_like(w), rounded(next(left), w.dtype), layer, 0)
        for w, fixed in zip(stacks, constant, strict=True)
    )
    return d_rows, d_stacks, *(None for _ in (layer, *rest))


_all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd, symbolic_zeros=True)


def _routes(counts: jax.Array, rounds: jax.Array, me: jax.Array | int, step: jax.Array) -> tuple[Route, Route]:
    """The way there and the way back of one round, in which every pair of devices exchanges an equal share.

    `counts` `[from, to]` are rows in all; those of one device lie ordered by target.
    """
    first, last = counts * step // rounds, counts * (step + 1) // rounds
    size = last - first
    start = jnp.cumsum(counts, axis=1) - counts + first  # where each device's rows for each other begin
    target = jnp.cumsum(size, axis=0) - size  # where they arrive, ordered by sender
    there = Route(start[me], size[me], target[me], size[:, me])
    back = Route(target[:, me], size[:, me], start[:, me], size[me])
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange(x: jax.Array, there: Route, back: Route, sizes: tuple[int, int], over: Axes) -> jax.Array:
    """Rows of x `[A, M]` to other devices and theirs to this one: `[R, M]`, zeros where nothing arrives.

    `sizes` are A and R. The gradient takes the way back.
    """
    return _travel(x, there, sizes[1], over)


def _exchange_fwd(
    x: jax.Array, there: Route, back: Route, sizes: tuple[int, int], over: Axes
) -> tuple[jax.Array, Route]:
    return _travel(x, there, sizes[1], over), back


def _exchange_bwd(sizes: tuple[int, int], over: Axes, back: Route, d_out: jax.Array) -> tuple[jax.Array, None, None]:
    return _travel(d_out, back, sizes[0], over), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _travel(x: jax.Array, route: Route, R: int, over: Axes) -> jax.Array:
    def ragged(x: jax.Array, route: Route) -> jax.Array:
        return lax.ragged_all_to_all(x, jnp.zeros((R, *x.shape[1:]), x.dtype), *route, axis_name=over)

    # XLA:CPU has no ragged all-to-all.
    return lax.platform_dependent(x, route, cpu=functools.partial(_gathered, R=R, over=over), default=ragged)


def _gathered(x: jax.Array, route: Route, R: int, over: Axes) -> jax.Array:
    """The same by way of all devices' rows."""
    everything = lax.all_gather(x, over)  # [n, A, ...]
    starts, _, targets, _ = lax.all_gather(route, over)  # of each device, for each other
    me = index(over)
    start, target, size = starts[:, me], targets[:, me], route.received
    row = jnp.arange(R)[:, None]
    inside = (row >= target) & (row < target + size)  # [R, n]
    sender = jnp.argmax(inside, axis=1)
    source = jnp.where(inside, start + row - target, 0)[jnp.arange(R), sender]
    arrived = jnp.any(inside, axis=1).reshape(R, *(1,) * (x.ndim - 1))
    return jnp.where(arrived, everything[sender, source], 0)
