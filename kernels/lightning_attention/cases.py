"""What `scripts/check_kernels.py` compiles of lightning attention: M1's heads, and few as on one of several GPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu import Case
from m1jax.kernels.lightning_attention.api import lightning_attention


def _case(name: str, B: int, T: int, H: int, dtype: str, grad: bool = False, **extra: jax.ShapeDtypeStruct) -> Case:
    D = 128
    shapes = {
        "qkv": jax.ShapeDtypeStruct((B, T, H, 3, D), dtype),
        "log_decay": jax.ShapeDtypeStruct((H,), jnp.float32),
        "state": jax.ShapeDtypeStruct((B, H, D, D), jnp.float32),
    } | extra

    def forward(*arrays: jax.Array) -> Any:
        return lightning_attention(**dict(zip(shapes, arrays, strict=True)), implementation="triton")  # type: ignore

    def backward(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda qkv, s: forward(qkv, arrays[1], s, *arrays[3:]), arrays[0], arrays[2])
        return vjp(out)

    return Case(
        f"lightning {name}", backward if grad else forward, tuple(shapes.values()), T > 1 and dtype == "bfloat16"
    )


CASES = [
    _case("decode", 8, 1, 64, "bfloat16"),
    _case("decode float32", 8, 1, 64, "float32"),
]
