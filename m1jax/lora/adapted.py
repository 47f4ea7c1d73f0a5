"""`Adapted`: a stack of matrices with low-rank factors beside it, as the model computes with it.

Letters: n layers of a kind, r rank, N rows, I channels in and O out of a matrix, each one or several axes.
"""

import dataclasses
from types import EllipsisType
from typing import Any

import jax

from m1jax.kernels.linear import linear
from m1jax.kernels.rounding import rounded

A, B = "lora_a", "lora_b"  # PEFT's names

# Matrices that can have factors, by path, and how many of their last axes are channels in.
IN_AXES = {
    "lightning.qkv_proj": 1,
    "lightning.output_gate": 1,
    "lightning.out_proj": 2,
    "softmax.q_proj": 1,
    "softmax.k_proj": 1,
    "softmax.v_proj": 1,
    "softmax.o_proj": 2,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """W + scale · B A in each layer of a stack; what has no gradient is W."""

    base: jax.Array  # [n, O, I]
    lora_a: jax.Array  # [n, r, I]
    lora_b: jax.Array  # [n, O, r]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices, `[n, O, I]`."""
        return self.base.shape

    def __getitem__(self, index: EllipsisType) -> "Adapted":
        """`a[...]` is a, as an `nnx.Param` asks for its value."""
        if index is not Ellipsis:
            raise TypeError("matrices with factors are multiplied by, not picked from by index")
        return self

    def axes(self, axes: tuple[str, ...]) -> "Adapted":
        """The logical axes of each array, where those of the matrices are `axes`."""
        of_factors = factor_axes(axes, self.lora_a.ndim - 2)
        return dataclasses.replace(self, base=axes, lora_a=of_factors[A], lora_b=of_factors[B])


def has_factors(model: Any) -> bool:
    """Whether some matrices of a model have factors: then nothing else of it is trained."""

    def found(x: Any) -> bool:
        return isinstance(x, Adapted)

    return any(map(found, jax.tree.leaves(model, is_leaf=found)))


def factor_axes(axes: tuple[str, ...], inputs: int) -> dict[str, tuple[str, ...]]:
    """The logical axes of the factors of a stack of matrices with these, of which the last `inputs` are channels in."""
    return {A: (axes[0], "rank", *axes[-inputs:]), B: (*axes[:-inputs], "rank")}


def product(x: jax.Array, stack: jax.Array | Adapted, layer: jax.Array | int) -> jax.Array:
    """x `[N, I]` times one layer of a stack, `[O, I]`: float32 `[N, O]`; A x is rounded to the dtype of x."""
    if not isinstance(stack, Adapted):
        return linear(x, stack.reshape(stack.shape[0], -1, x.shape[1]), layer)
    (n, r), base = stack.lora_a.shape[:2], product(x, stack.base, layer)
    low = rounded(linear(x, stack.lora_a.reshape(n, r, -1), layer), x.dtype)
    return base + stack.scale * linear(low, stack.lora_b.reshape(n, -1, r), layer)
