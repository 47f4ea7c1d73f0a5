"""MiniMax-M1 in JAX: exact, fast, shardable. See `load`, `M1Config`, `M1` and `M1State`."""

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.loading import load
from m1jax.model import M1, M1State

__all__ = ["M1", "M1Config", "M1State", "UserError", "load"]
