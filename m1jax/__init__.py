"""MiniMax-M1 in JAX: exact, fast, shardable. See `load`, `M1Config`, `M1` and `M1State`."""

import importlib
from typing import TYPE_CHECKING, Any

from m1jax.errors import UserError

if TYPE_CHECKING:
    from m1jax.config import M1Config
    from m1jax.loading import load
    from m1jax.model import M1
    from m1jax.state import M1State

__all__ = ["M1", "M1Config", "M1State", "UserError", "load"]

_HOME = {"load": "loading", "M1Config": "config", "M1": "model", "M1State": "state"}


def __getattr__(name: str) -> Any:
    """Imports jax on first use only: commands answer --help, bad arguments and Ctrl-C before that."""
    if name not in _HOME:
        raise AttributeError(f"module 'm1jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"m1jax.{_HOME[name]}"), name)
