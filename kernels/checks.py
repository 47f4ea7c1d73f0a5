"""Checks of arguments that several ops have."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def check_integers(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `array` is an array of integers of this shape."""
    found = getattr(array, "shape", None)
    if found != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        got = f"a {type(array).__name__}" if found is None else f"{array.dtype} {found}"
        raise ValueError(f"{name}: expected integers {shape}, got {got}")


def checked_layer(layer: Any, layers: int) -> jax.Array | int:
    """The layer, int32 or, where its value is known, an `int`.

    Raises:
      ValueError: it is not one integer, or known not to be from 0 to `layers` - 1.
    """
    if jnp.shape(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise ValueError(f"layer: expected one integer, got {layer}")
    if isinstance(layer, Tracer):
        return layer.astype(jnp.int32)
    if not 0 <= int(layer) < layers:
        raise ValueError(f"layer: expected 0 to {layers - 1}, got {int(layer)}")
    return int(layer)


def check_implementation(name: str, known: tuple[str, ...], reason: str | None) -> str:
    """The name; raises `ValueError` if it is not a known one, or cannot run for a reason."""
    if name not in known:
        raise ValueError(f"implementation: unknown {name!r}: expected None or one of {known}")
    if reason:
        raise ValueError(f"implementation: {name!r} cannot run: {reason}")
    return name
