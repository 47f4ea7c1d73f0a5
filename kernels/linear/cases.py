"""The cases of products with one matrix of a stack: M1's projections while decoding."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu.case import Case, Normal
from m1jax.kernels.linear.api import linear
from m1jax.kernels.linear.gpu import default_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """N rows of I channels times one of L matrices."""

    N: int
    O: int
    I: int = 6144
    L: int = 8

    def reduced(self) -> Self:
        """Channels that no tile divides."""
        return dataclasses.replace(self, N=min(self.N, 40), O=self.O // 64 - 8, I=200 if self.I == 6144 else 512, L=3)

    @property
    def matmul(self) -> bool:
        """A single row is multiplied on the ordinary cores."""
        return default_tiles(self.N, self.O, self.I).rows > 1

    @property
    def forms(self) -> tuple[str, ...]:
        """None for float32."""
        return ("triton",) if self.dtype == "bfloat16" else ()

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """Those of `linear`."""
        return {
            "x": normal(1, (self.N, self.I), self.dtype, 1),
            "stack": normal(2, (self.L, self.O, self.I), self.dtype, self.I**-0.5),
            "layer": jnp.asarray(self.L - 1),
        }

    def call(self, implementation: Any, arguments: dict[str, Any]) -> jax.Array:
        """The product."""
        return linear(**arguments, implementation=implementation)


_SHAPES = {"qkv": (24576, 6144), "gate": (8192, 6144), "out": (6144, 8192), "keys": (1024, 6144)}

CASES = tuple(
    LinearCase(name=f"{name} B={N}", N=N, O=O, I=I) for N in (1, 32, 128, 256) for name, (O, I) in _SHAPES.items()
)
