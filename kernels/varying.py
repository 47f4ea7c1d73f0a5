"""Mesh axes that arrays vary over, of which `jax.shard_map` keeps track but with `check_vma=False`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same arrays, each varying over all mesh axes that any of them varies over; outside `shard_map` untouched.

    Loops and branches want this of what they carry and return, and a gradient by a rule of its own of its arguments:
    to what was the same on several devices it comes added up.
    """
    every = frozenset[str]().union(*(_axes(x) for x in jax.tree.leaves(trees)))

    def cast(x: Any) -> Any:
        missing = every - _axes(x)
        return lax.pcast(jnp.asarray(x), tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, trees)


def _axes(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
