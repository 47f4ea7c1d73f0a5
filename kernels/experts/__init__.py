"""The experts of a mixture: SwiGLU of each token by its chosen experts only."""

from m1jax.kernels.experts.api import experts

__all__ = ["experts"]
