"""FLOPs and communication of a JAX function, counted in its jaxpr: shapes and trip counts, nothing is compiled or run.

`compiled.cost_analysis()` counts the body of a loop once and says nothing on GPUs; a jaxpr has every loop's length.
Inside `shard_map` shapes are those of one device and collectives are explicit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

Branches = Literal["largest", "average"]

ONCE = "mostly_once"  # the name of a scope whose `lax.scan` counts as one turn: the others are for rare loads


class Collective(NamedTuple):
    """A collective operation among the `devices` of mesh `axes`; `nbytes` is what one device puts in."""

    kind: str  # the name of jax's primitive, e.g. "all_gather"
    axes: tuple[str, ...]
    devices: int
    nbytes: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in a ring where the operation allows one."""
        n = self.devices
        if self.kind in ("psum", "pmax", "pmin"):
            return 2 * (n - 1) / n * self.nbytes
        if self.kind == "all_gather":
            return (n - 1) * self.nbytes
        return self.nbytes if self.kind == "ppermute" else (n - 1) / n * self.nbytes


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a function costs.

    Attributes:
      matmul: FLOPs of dot products, two per multiply-add; of all devices together.
      other: FLOPs of everything else, one per element computed.
      collectives: how often each runs, on each device.
    """

    matmul: float = 0.0
    other: float = 0.0
    collectives: Mapping[Collective, float] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.matmul + self.other

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return sum(times * collective.sent for collective, times in self.collectives.items())

    def times(self, n: float, devices: int = 1) -> "Cost":
        """The cost of n runs, on so many devices each."""
        collectives = {collective: times * n for collective, times in self.collectives.items()}
        return Cost(self.matmul * n * devices, self.other * n * devices, collectives)

    def __add__(self, other: "Cost") -> "Cost":
        collectives = dict(self.collectives)
        for collective, times in other.collectives.items():
            collectives[collective] = collectives.get(collective, 0) + times
        return Cost(self.matmul + other.matmul, self.other + other.other, collectives)


def count(function: Callable[..., Any], *args: Any, branches: Branches = "largest") -> Cost:
    """The cost of `function(*args)`; arrays may be abstract.

    Of a `lax.platform_dependent` the form that is not for CPUs is counted.

    Args:
      function: what to count.
      args: its arguments.
      branches: what a `lax.cond` or `lax.switch` is taken to cost: its largest branch, or the average of all.

    Raises:
      ValueError: there is a loop whose length is unknown, or a kernel that hides its work; named.
    """
    return cost_of(jax.make_jaxpr(function)(*args).jaxpr, branches)


# fmt: off
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "acos", "asin", "atan", "atan2", "cbrt", "ceil", "clamp", "cos", "cosh", "div", "erf",
    "erf_inv", "exp", "exp2", "expm1", "floor", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "nextafter", "pow", "rem", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
})
# fmt: on
_ACCUMULATING = ("reduce", "argm", "cum", "scatter-", "scatter_add", "scatter_mul")  # beginnings of names
_MOVING = ("reduce_precision",)  # no arithmetic, though the name begins so
_COLLECTIVES = {
    "psum": "psum",
    "psum_invariant": "psum",
    "pmax": "pmax",
    "pmin": "pmin",
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "all_to_all": "all_to_all",
    "ragged_all_to_all": "all_to_all",
    "reduce_scatter": "reduce_scatter",
    "ppermute": "ppermute",
}
_OPAQUE = ("pallas_call", "triton_kernel_call", "ffi_call", "mosaic_gpu")


def cost_of(jaxpr: Any, branches: Branches = "largest") -> Cost:
    """The same of a jaxpr."""
    total = Cost()
    for eqn in jaxpr.eqns:
        total += _equation(eqn, branches)
    return total


def _equation(eqn: Any, branches: Branches) -> Cost:
    name = eqn.primitive.name
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        return Cost(matmul=_PRODUCTS[name](eqn))
    if name in _COLLECTIVES:
        return _collective(eqn)
    if name in _OPAQUE:
        raise ValueError(f"function: {name} hides its work: count a form without custom kernels")
    if name in _ELEMENTWISE:
        return Cost(other=math.prod(eqn.outvars[0].aval.shape))
    if name.startswith(_ACCUMULATING):
        return Cost(other=0 if name in _MOVING else math.prod(eqn.invars[-1 if "scatter" in name else 0].aval.shape))
    if name == "cond":
        return _cond(eqn, branches)
    if name == "while":
        raise ValueError("function: it has a while loop, whose length is unknown: use lax.scan")
    inner = [cost_of(jaxpr, branches) for jaxpr in _subjaxprs(eqn.params.values())]
    cost = sum(inner, Cost())
    if name == "scan":
        return cost.times(1 if ONCE in str(eqn.source_info.name_stack).split("/") else eqn.params["length"])
    if name == "shard_map":
        mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        return cost.times(1, devices=math.prod(mesh.shape[axis] for axis in manual))
    return cost


def _subjaxprs(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _subjaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def _cond(eqn: Any, branches: Branches) -> Cost:
    jaxprs, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is not None:  # the form for all other platforms, which comes last
        return cost_of(jaxprs[-1].jaxpr, branches)
    costs = [cost_of(branch.jaxpr, branches) for branch in jaxprs]
    if branches == "largest":
        return max(costs, key=lambda cost: (cost.flops, cost.sent))
    return sum(costs, Cost()).times(1 / len(costs))


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Every row meets the matrix of its own group only, whatever is ragged."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    skip = {*contracted, *batched, *numbers.rhs_group_dimensions}
    columns = math.prod(size for i, size in enumerate(rhs) if i not in skip)
    return 2 * math.prod(lhs) * columns


def _convolution(eqn: Any) -> float:
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    per_output = math.prod(size for i, size in enumerate(kernel) if i != numbers.rhs_spec[0])
    return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}


def _collective(eqn: Any) -> Cost:
    params = eqn.params
    axes = params.get("axes") or params.get("axis_name") or ()
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if isinstance(axis, str))
    sizes = eqn.ctx.cur_abstract_mesh.shape
    n = math.prod(sizes[axis] for axis in axes)
    values = [v for v in eqn.invars if hasattr(v.aval, "dtype")]
    if eqn.primitive.name == "ragged_all_to_all":
        # Operand and output, then offsets and sizes. The larger of the two has room to spare.
        values = [min(values[:2], key=lambda v: math.prod(v.aval.shape))]
    kind = _COLLECTIVES[eqn.primitive.name]
    collectives: dict[Collective, float] = {}
    for v in values:
        collective = Collective(kind, axes, n, math.prod(v.aval.shape) * v.aval.dtype.itemsize)
        if n > 1:
            collectives[collective] = collectives.get(collective, 0) + 1
    other = sum(math.prod(v.aval.shape) for v in values) if kind in ("psum", "pmax", "pmin", "reduce_scatter") else 0
    return Cost(other=other, collectives=collectives)
