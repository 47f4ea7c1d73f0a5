"""An estimate of the temporary memory of a JAX function, from its jaxpr: what is alive at once, in the order written.

The compiler knows better: it fuses, reorders and copies. What is assumed of it: elementwise work with one consumer that
can take it up is never written to memory, reshapes are free, updates happen in place, also in the carry of a loop.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

# What a consumer takes up while it reads its own inputs; and what can take it up.
_FUSED = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "cos", "div", "eq",
    "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "reduce_precision", "rem", "rev",
    "round", "rsqrt", "select_n", "shift_left", "shift_right_logical", "sign", "sin", "slice", "split", "sqrt",
    "square", "sub", "tanh", "transpose", "xor",
})  # fmt: skip
_FED = ("convert_element_type", "dynamic_slice", "gather", "slice", "transpose")  # read by a product as well
_CONSUMING = ("reduce", "argm", "cum", "scatter", "dynamic_update_slice", "concatenate", "gather", "dynamic_slice")
_SAME = frozenset({
    "reshape", "squeeze", "expand_dims", "copy", "optimization_barrier", "stop_gradient", "bitcast_convert_type",
})  # fmt: skip
_IN_PLACE = ("dynamic_update_slice", "scatter")


def temporaries(function: Callable[..., Any], *args: Any, devices: int = 1) -> int:
    """Estimated bytes of temporaries of `function(*args)`, which may be abstract.

    Of each device: inside `shard_map` shapes are its own, outside each of `devices` is taken to hold an equal part.
    """
    return temporaries_of(jax.make_jaxpr(function)(*args).jaxpr, devices)


def temporaries_of(jaxpr: Any, devices: int = 1) -> int:
    """The same of a jaxpr."""
    while len(jaxpr.eqns) == 1 and (inner := _callee(jaxpr.eqns[0])) is not None:
        devices = 1 if jaxpr.eqns[0].primitive.name == "shard_map" else devices
        jaxpr = inner
    return _peak(jaxpr, devices, outputs=False)


def _bytes(var: Any) -> int:
    aval = var.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "dtype") and hasattr(aval, "shape") else 0


class _Buffers:
    """Which buffer each variable of a jaxpr lies in: None for those of the caller, else the first that lay in it."""

    def __init__(self, jaxpr: Any, devices: int) -> None:
        self._devices = devices
        self.of: dict[Any, Any] = dict.fromkeys((*jaxpr.invars, *jaxpr.constvars))
        self.size: dict[Any, int] = {}
        self.end: dict[Any, int] = {}  # index of the equation that reads it last
        self._users: dict[Any, list[tuple[int, Any]]] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            for var in eqn.invars:
                if not hasattr(var, "val"):  # a literal
                    self._users.setdefault(var, []).append((i, eqn))
        outputs = {id(var) for var in jaxpr.outvars}
        for i, eqn in enumerate(jaxpr.eqns):
            for var, origin in zip(eqn.outvars, _origins(eqn), strict=True):
                self._add(i, eqn, var, origin, len(jaxpr.eqns) if id(var) in outputs else None)

    def _add(self, i: int, eqn: Any, var: Any, origin: Any, end: int | None) -> None:
        root = var if origin is None or hasattr(origin, "val") else self.of[origin]
        self.of[var] = root
        if root is None:
            return
        users = self._users.get(var, [])
        if root is var:
            needed = end is not None or _written(eqn, [user for _, user in users])
            self.size[var] = _bytes(var) // self._devices if needed else 0
        last = end if end is not None else max((n for n, _ in users), default=i)
        self.end[root] = max(self.end.get(root, i), last)


def _peak(jaxpr: Any, devices: int, outputs: bool = True) -> int:
    """Most bytes alive at once, without the inputs; with or without the outputs."""
    buffers = _Buffers(jaxpr, devices)
    if not outputs:
        roots = {buffers.of[var] for var in jaxpr.outvars if not hasattr(var, "val")} - {None}
        buffers.size.update(dict.fromkeys(roots, 0))
    live = peak = 0
    alive: set[Any] = set()
    for i, eqn in enumerate(jaxpr.eqns):
        before = live
        new = {buffers.of[var] for var in eqn.outvars} - alive - {None}
        alive |= new
        live += sum(buffers.size[root] for root in new)
        # What a call or branch returns is among its own temporaries already.
        returns = eqn.primitive.name == "cond" or _callee(eqn) is not None
        peak = max(peak, live, (before if returns else live) + _inner(eqn, devices))
        for root in [root for root in alive if buffers.end[root] <= i]:
            alive.remove(root)
            live -= buffers.size[root]
    return peak


def _origins(eqn: Any) -> list[Any]:
    """For each output the input whose buffer it takes over."""
    name = eqn.primitive.name
    same = name == "broadcast_in_dim" and eqn.invars and _bytes(eqn.invars[0]) == _bytes(eqn.outvars[0])
    if same or name in _SAME or name.startswith(_IN_PLACE):
        return list(eqn.invars[: len(eqn.outvars)])
    if name == "scan":
        # Told by shapes, as the names of its parameters change: what is cut or stacked has an axis more outside.
        (inner,) = _jaxprs(eqn)
        whole = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.invars, inner.invars, strict=True))
        carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, inner.outvars, strict=True))
        return [*eqn.invars[whole - carry : whole], *[None] * (len(eqn.outvars) - carry)]
    return [None] * len(eqn.outvars)


def _written(eqn: Any, users: list[Any]) -> bool:
    """Whether a result must be in memory for those that use it."""
    own = eqn.primitive.name
    if len(users) != 1 or own not in (*_FUSED, *_FED):
        return True
    name = users[0].primitive.name
    if name == "dot_general":  # a plain product converts what it reads, a batched one wants it converted
        return own not in _FED or (own != "transpose" and bool(users[0].params["dimension_numbers"][1][0]))
    return not (name in _FUSED or name in _SAME or name.startswith(_CONSUMING))


def _callee(eqn: Any) -> Any:
    """The jaxpr that an equation does nothing but run once; else None."""
    if eqn.primitive.name in ("scan", "while", "cond") or eqn.primitive.name.startswith(("reduce", "scatter")):
        return None
    inner = _jaxprs(eqn)
    return inner[0] if len(inner) == 1 else None


def _jaxprs(eqn: Any) -> list[Any]:
    """Those among an equation's parameters."""
    found = (value for value in eqn.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns"))
    return [getattr(value, "jaxpr", value) for value in found]


def _inner(eqn: Any, devices: int) -> int:
    """Temporaries inside a loop, branch or call."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        jaxprs = params["branches"][-1:] if params.get("branches_platforms") else params["branches"]
        return max(_peak(branch.jaxpr, devices) for branch in jaxprs)
    if name.startswith(("reduce", "scatter", "arg", "cum")):
        return 0
    devices = 1 if name == "shard_map" else devices
    return max((_peak(jaxpr, devices) for jaxpr in _jaxprs(eqn)), default=0)
