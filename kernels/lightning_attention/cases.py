"""What `scripts/check_kernels.py` compiles of lightning attention: M1's heads, and few as on one of several GPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu import Case
from m1jax.kernels.lightning_attention.api import lightning_attention


def _case(
    name: str, B: int, T: int, H: int = 64, D: int = 128, dtype: str = "bfloat16", packed: bool = False,
    grad: bool = False,
) -> Case:  # fmt: skip
    shapes = {
        "qkv": jax.ShapeDtypeStruct((B, T, H, 3, D), dtype),
        "log_decay": jax.ShapeDtypeStruct((H,), jnp.float32),
        "state": jax.ShapeDtypeStruct((B, H, D, D), jnp.float32),
    }
    if packed:
        shapes["segments"] = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(*arrays: jax.Array) -> Any:
        named: dict[str, Any] = dict(zip(shapes, arrays, strict=True))
        return lightning_attention(**named, implementation="triton")

    def backward(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda qkv, s: forward(qkv, arrays[1], s, *arrays[3:]), arrays[0], arrays[2])
        return vjp(out)

    fn = backward if grad else forward
    # Tiles of 32 rows are below HGMMA's 64, float32 is multiplied on the ordinary cores.
    return Case(f"lightning {name}", fn, tuple(shapes.values()), matmul=T > 1 and D >= 64 and dtype == "bfloat16")


CASES = [
    _case("decode", 8, 1),
    _case("decode float32", 8, 1, dtype="float32"),
    _case("backward", 1, 8192, grad=True),  # with the forward sweep
    _case("backward packed", 1, 8192, packed=True, grad=True),
    _case("backward 8 heads, in parts", 1, 8192, H=8, grad=True),
    _case("backward 8 heads packed, in parts", 1, 8192, H=8, packed=True, grad=True),
    _case("backward head_dim 64", 1, 2048, D=64, grad=True),
    _case("backward head_dim 32", 1, 2048, D=32, grad=True),
    _case("backward float32", 1, 512, dtype="float32", grad=True),
]
