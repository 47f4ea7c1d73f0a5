"""Products with one matrix out of a stack of layers' matrices."""

from m1jax.kernels.linear.api import linear

__all__ = ["linear"]
