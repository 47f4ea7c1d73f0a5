"""The cases of lightning attention: M1's heads, and few as on one of several GPUs."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu.case import Case, Normal
from m1jax.kernels.lightning_attention import gpu
from m1jax.kernels.lightning_attention.api import lightning_attention, log_decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningCase(Case):
    """B rows of T tokens, H heads of D channels.

    `layers` is how many layers' states are given, of which one is used: 0 is none, so zeros, 1 the state itself.
    """

    T: int
    B: int = 1
    H: int = 64
    D: int = 128
    layers: int = 0
    ragged: bool = False
    packed: bool = False

    def reduced(self) -> Self:
        """A chunk, of 64 tokens or 16, and 8 tokens more."""
        T, H = min(self.T, 24 if self.dtype == "float32" else 72), 1 if self.grad else 2
        return dataclasses.replace(self, T=T, B=min(self.B, 2), H=H, layers=min(self.layers, 3))

    @property
    def matmul(self) -> bool:
        """Tiles of 32 rows are below HGMMA's 64, float32 is multiplied on the ordinary cores."""
        return self.T > 1 and self.D >= 64 and self.dtype == "bfloat16"

    @property
    def forms(self) -> tuple[str, ...]:
        """Mosaic's sweeps where they do it."""
        qkv = jax.ShapeDtypeStruct((self.B, self.T, self.H, 3, self.D), self.dtype)
        why_not = gpu.refusal_of_mosaic(qkv, self.packed, log_decay(self.H, 35, 80))
        return ("triton",) if why_not else ("mosaic", "triton")

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """Those of `lightning_attention`, and `d_out`, zero where o is undefined."""
        B, T, H, D = self.B, self.T, self.H, self.D
        found: dict[str, Any] = {
            "qkv": normal(1, (B, T, H, 3, D), self.dtype, 1),
            "log_decay": jnp.asarray(log_decay(H, 35, 80)),
        }
        if self.layers:
            lead = (self.layers,) if self.layers > 1 else ()
            found["state"] = normal(2, (*lead, B, H, D, D), "float32", 1)
        if self.layers > 1:
            found["layer"] = jnp.asarray(1)
        row = jnp.arange(B)[:, None]
        if self.ragged:
            found["lengths"] = T - T * row[:, 0] // B
        if self.packed:  # five segments, of which the third is padding; in all rows but the first padding before them
            position = jnp.arange(T)
            ids = 1 + position * 5 // T
            found["segments"] = jnp.where((ids == 3) | (position < row * T // 2), 0, ids)
        if self.grad:
            found["d_out"] = self._at_valid(found, normal(3, (B, T, H, D), self.dtype, 1))
        return found

    def call(self, implementation: Any, arguments: dict[str, Any]) -> Any:
        """Gradients are of qkv and the state; that of the final state is given with the state."""
        rest = dict(arguments)
        d_out = rest.pop("d_out", None)
        if not self.grad:
            return lightning_attention(**rest, implementation=implementation)
        wanted = {name: rest.pop(name) for name in ("qkv", "state") if name in rest}
        (_, state), vjp = jax.vjp(lambda w: lightning_attention(**w, **rest, implementation=implementation), wanted)
        return vjp((d_out, wanted.get("state", jnp.zeros_like(state))))

    def defined(self, arguments: dict[str, Any], outputs: Any) -> Any:
        """Without o at padded tokens."""
        return outputs if self.grad else (self._at_valid(arguments, outputs[0]), outputs[1])

    def _at_valid(self, arguments: dict[str, Any], out: jax.Array) -> jax.Array:
        if self.ragged:
            out = jnp.where((jnp.arange(self.T) < arguments["lengths"][:, None])[..., None, None], out, 0)
        if self.packed:
            out = jnp.where((arguments["segments"] > 0)[..., None, None], out, 0)
        return out


FORWARD = {8192: 200e-6, 32768: 800e-6, 131072: 3200e-6, 2**20: 25600e-6}
BACKWARD = {8192: 600e-6, 32768: 2400e-6, 131072: 9600e-6, 2**20: 76700e-6}
STEP = {1: 5e-6, 32: 75e-6, 128: 290e-6}
UNEVEN = 4136  # tokens: 8 heads of two rows are cut into four parts

CASES = (
    *(LightningCase(name=f"forward {T}", T=T, must=must) for T, must in FORWARD.items()),
    LightningCase(name="forward 4096", T=4096, layers=1, whole=True),
    LightningCase(name="forward packed", T=8192, packed=True),
    LightningCase(name="forward 8 heads, in parts", T=131072, H=8),
    LightningCase(name="forward uneven parts", T=UNEVEN, B=2, H=8, layers=3, ragged=True, whole=True),
    LightningCase(name="forward packed, uneven parts", T=UNEVEN, B=3, H=4, packed=True, whole=True),
    *(LightningCase(name=f"backward {T}", T=T, layers=1, grad=True, must=must) for T, must in BACKWARD.items()),
    LightningCase(name="backward 8 heads of 4096", T=4096, H=8, layers=1, grad=True, whole=True),
    LightningCase(name="backward without a state", T=8192, grad=True),
    LightningCase(name="backward packed", T=8192, layers=1, packed=True, grad=True),
    LightningCase(name="backward packed without a state", T=8192, packed=True, grad=True),
    LightningCase(name="backward 8 heads, in parts", T=8192, H=8, layers=1, grad=True),
    LightningCase(name="backward 8 heads packed, in parts", T=8192, H=8, layers=1, packed=True, grad=True),
    LightningCase(name="backward uneven parts", T=UNEVEN, B=2, H=8, layers=3, ragged=True, grad=True, whole=True),
    LightningCase(name="backward packed, uneven parts", T=UNEVEN, B=3, H=4, packed=True, grad=True, whole=True),
    LightningCase(name="backward head_dim 64", T=2048, D=64, layers=1, grad=True),
    LightningCase(name="backward head_dim 32", T=2048, D=32, layers=1, grad=True),
    LightningCase(name="backward float32", T=512, layers=1, dtype="float32", grad=True),
    # The states of one layer alone would stay in the cache at B = 1.
    *(LightningCase(name=f"decode B={B}", T=1, B=B, layers=32, must=must) for B, must in STEP.items()),
    LightningCase(name="decode float32", T=1, B=8, layers=2, dtype="float32"),
)
