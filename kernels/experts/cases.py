"""What `scripts/check_kernels.py` compiles of the experts: M1's shapes, training, prefill and decode."""

from typing import Any

import jax
import jax.numpy as jnp

from m1jax.kernels.experts.api import experts
from m1jax.kernels.experts.quantized import Quantization, Quantized, stored_shapes
from m1jax.kernels.gpu import Case

L, E, F, M, K = 2, 32, 9216, 6144, 2  # M1's, but for the number of layers


def _stack(shape: tuple[int, ...], dtype: str, kind: Quantization | None) -> Any:
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    values, scales = stored_shapes(kind, shape)
    parts: Any = (
        jax.ShapeDtypeStruct(values, "int8" if kind == "int8" else "uint8"),
        jax.ShapeDtypeStruct(scales, "float32"),
    )
    return Quantized(*parts)


def _case(name: str, N: int, dtype: str = "bfloat16", kind: Quantization | None = None, grad: bool = False) -> Case:
    args = (
        jax.ShapeDtypeStruct((N, M), dtype),
        _stack((L, E, 2, F, M), dtype, kind),
        _stack((L, E, M, F), dtype, kind),
        jax.ShapeDtypeStruct((N, K), jnp.int32),
        jax.ShapeDtypeStruct((N, K), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    def forward(*a: Any) -> jax.Array:
        return experts(*a[:5], layer=a[5], implementation="triton")

    def backward(*a: Any) -> Any:
        wanted = (0,) if kind else (0, 1, 2)
        return jax.grad(lambda *a: jnp.sum(forward(*a)), argnums=wanted)(*a)

    return Case(f"experts {name}", backward if grad else forward, args, dtype == "bfloat16")


CASES = [
    _case("decode", 1),
    _case("decode int8", 1, kind="int8"),
    _case("decode int4", 1, kind="int4"),
    _case("decode 128 tokens", 128),  # the most whose rows each program finds on its own
    _case("decode 128 tokens int8", 128, kind="int8"),
    _case("decode 128 tokens int4", 128, kind="int4"),
    _case("decode 160 tokens", 160),  # sorted, in narrow tiles
    _case("decode 160 tokens int8", 160, kind="int8"),
    _case("decode 160 tokens int4", 160, kind="int4"),
    _case("1,024 tokens", 1024),
    _case("1,024 tokens int8", 1024, kind="int8"),
    _case("1,024 tokens int4", 1024, kind="int4"),
    _case("8,192 tokens int8", 8192, kind="int8"),
    _case("8,192 tokens int4", 8192, kind="int4"),
    _case("gradients", 8192, grad=True),  # and the forward pass
    _case("gradients, 1,024 tokens", 1024, grad=True),
    _case("gradient int8", 8192, kind="int8", grad=True),
    _case("gradient int4", 8192, kind="int4", grad=True),
    _case("float32", 8192, dtype="float32", grad=True),
]
