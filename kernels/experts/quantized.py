"""Expert weights in int8 or int4 with float32 scales, and products with them that convert inside the loop.

int8: one scale for each out channel. int4: one for each group of 128 consecutive in-channels of an out channel; two
values share a byte, channel c of the group in the low and channel c + 64 in the high half, each plus 8, so that a
group is 64 consecutive bytes and unpacks into two contiguous pieces.
"""

import dataclasses
from types import EllipsisType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from m1jax.kernels.isolate import isolated
from m1jax.kernels.linear import xla as linear

Quantization = Literal["int8", "int4"]

GROUP = 128  # in-channels that share an int4 scale, where the width allows
_HOST_BLOCK = 1 << 20  # weights in work at once on the host
_LARGEST = {"int8": 127, "int4": 7}
_OFFSET = 8  # what is added to an int4 value to store it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Weights `[..., O, I]` of O out and I in channels; value · scale is the weight.

    `values` is int8 `[..., O, I]` with float32 `scales` `[..., O]`, or uint8 `[..., O, I/2]` (int4) with float32
    `scales` `[..., O, I/G]`.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def kind(self) -> Quantization:
        """ "int8" or "int4"."""
        return "int8" if self.values.dtype == jnp.int8 else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, `[..., O, I]`."""
        *rest, stored = self.values.shape
        return (*rest, stored if self.kind == "int8" else 2 * stored)

    @property
    def group(self) -> int:
        """In-channels that share a scale: I for int8, G for int4."""
        return self.shape[-1] if self.kind == "int8" else self.shape[-1] // self.scales.shape[-1]

    def axes(self, axes: tuple[str, ...]) -> "Quantized":
        """The logical axes of both arrays, where those of the weights are `axes`."""
        return Quantized(axes, axes[: self.scales.ndim])  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: EllipsisType) -> "Quantized":
        """`q[...]` is q, as an `nnx.Param` asks for its value."""
        if index is not Ellipsis:
            raise TypeError("quantised weights are picked from by the ops that take them, not by index")
        return self


Weights = jax.Array | Quantized


def group_of(width: int) -> int:
    """G: the largest power of two up to 128 that divides I; an odd I raises `ValueError`."""
    group = min(GROUP, width & -width)
    if group < 2:
        raise ValueError(f"in-channels: int4 stores them in pairs, {width} is odd")
    return group


def stored_shapes(kind: Quantization, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of values and scales of weights `[..., O, I]`."""
    *rest, width = shape
    if kind == "int8":
        return shape, tuple(rest)
    return (*rest, width // 2), (*rest, width // group_of(width))


def quantize(weights: jax.Array, kind: Quantization) -> Quantized:
    """Rounds weights `[..., O, I]` to the nearest of 255 (int8) or 15 (int4) even steps up to the largest of a group.

    A group that holds infinity or NaN gets the scale infinity, so that it is seen in whatever is computed with it.

    Raises:
      ValueError: an unknown `kind`, or an odd I for int4.
    """
    return Quantized(*_rounded(weights, kind, jnp))


def quantize_on_host(weights: NDArray[Any], kind: Quantization) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Values and scales of `quantize`, bit for bit, from and to NumPy; some rows at a time."""
    *rest, width = weights.shape
    rows = weights.reshape(-1, width)
    step = max(1, _HOST_BLOCK // max(width, 1))
    with np.errstate(all="ignore"):
        parts = [_rounded(rows[i : i + step], kind, np) for i in range(0, max(len(rows), 1), step)]
    values, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return values.reshape(*rest, -1), scales.reshape(*rest, *scales.shape[1:])


def _rounded(weights: Any, kind: Quantization, xp: Any) -> tuple[Any, Any]:
    if kind not in _LARGEST:
        raise ValueError(f"kind: unknown {kind!r}: expected 'int8' or 'int4'")
    *rest, width = weights.shape
    group = width if kind == "int8" else group_of(width)
    grouped = weights.astype(xp.float32).reshape(*rest, width // group, group)
    # A maximum over NaN is not NaN everywhere.
    largest = xp.max(xp.where(xp.isfinite(grouped), xp.abs(grouped), xp.float32(xp.inf)), axis=-1)
    scales = xp.where(largest == 0, xp.float32(1), largest * xp.float32(1 / _LARGEST[kind]))
    steps = xp.nan_to_num(xp.rint(grouped * (1 / scales)[..., None]), nan=0, posinf=0, neginf=0)
    steps = xp.clip(steps, -_LARGEST[kind], _LARGEST[kind]).astype(xp.int8)
    if kind == "int8":
        return steps.reshape(*rest, width), scales[..., 0]
    low, high = xp.split((steps + _OFFSET).astype(xp.uint8), 2, axis=-1)
    return (low | (high << 4)).reshape(*rest, width // 2), scales


def dequantize(weights: Weights) -> jax.Array:
    """The float32 weights `[..., O, I]`; of float weights just that."""
    if not isinstance(weights, Quantized):
        return weights.astype(jnp.float32)
    if weights.kind == "int8":
        return weights.values.astype(jnp.float32) * weights.scales[..., None]
    values = _unpacked(weights.values, weights.group)
    return (values * weights.scales[..., None]).reshape(weights.shape)


def _unpacked(packed: jax.Array, group: int) -> jax.Array:
    """int4 values as float32 `[..., O, I/G, G]`."""
    grouped = packed.reshape(*packed.shape[:-1], -1, group // 2)
    halves = jnp.concatenate([grouped & 15, grouped >> 4], axis=-1)
    return halves.astype(jnp.float32) - _OFFSET


def join_rows(weights: Weights) -> Weights:
    """`[..., A, O, I]` to `[..., A·O, I]`."""

    def join(x: jax.Array, trailing: int) -> jax.Array:
        at = x.ndim - trailing - 2
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    if not isinstance(weights, Quantized):
        return join(weights, 1)
    return Quantized(join(weights.values, 1), join(weights.scales, 0 if weights.kind == "int8" else 1))


def layer_of(weights: Weights, layer: jax.Array | int) -> Weights:
    """One layer of a stack `[L, ...]`."""
    return jax.tree.map(lambda x: x[layer], weights)


def product(x: jax.Array, stack: Weights, index: linear.Index) -> jax.Array:
    """x `[N, I]` times the transpose of `stack[index]`, `[O, I]`: float32 `[N, O]`, one matrix converted at a time."""
    if not isinstance(stack, Quantized):
        return linear.product(x, stack, index)
    return isolated(_product, index[0], x, stack, index)


def _product(x: jax.Array, stack: Quantized, index: linear.Index) -> jax.Array:
    lead, own = len(index), stack.scales.shape[len(index) :]
    start, size = (*index, *(0,) * len(own)), (*(1,) * lead, *own)
    scales = lax.dynamic_slice(stack.scales, tuple(map(jnp.int32, start)), size).reshape(own)
    values = linear.pick(stack.values, index)
    if stack.kind == "int8":
        # The values are exact in bfloat16, which is slow for a single row; the scales come after the sum.
        return linear.dot(x.astype(jnp.float32) if x.shape[0] == 1 else x, values) * scales
    weights = _unpacked(values, stack.group) * scales[..., None]
    return linear.dot(x, weights.reshape(stack.shape[lead:]).astype(x.dtype))
