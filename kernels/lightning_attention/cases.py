"""The cases of lightning attention: M1's heads, and few as on one of several GPUs."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.kernels.gpu.case import Case, Normal
from m1jax.kernels.lightning_attention import gpu
from m1jax.kernels.lightning_attention.api import lightning_attention, log_decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningCase(Case):
    """B rows of T tokens, H heads of D channels.

    `layers` is how many layers' states are given, of which one is used: 0 is none, so zeros, 1 the state itself.
    `of` is the layer of M1 whose decays they are: of H of its 64 heads, evenly from the fastest on.
    """

    T: int
    B: int = 1
    H: int = 64
    D: int = 128
    layers: int = 0
    of: int = 35
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
        why_not = gpu.refusal_of_mosaic(qkv, self.packed, self.decay)
        return ("triton",) if why_not else ("mosaic", "triton")

    @property
    def decay(self) -> np.ndarray:
        """log λ of each head, float32 `[H]`."""
        return log_decay(64, self.of, 80)[:: 64 // self.H]

    @property
    def lengths(self) -> np.ndarray:
        """Of ragged rows, int32 `[B]`."""
        return self.T - self.T * np.arange(self.B, dtype=np.int32) // self.B

    @property
    def segments(self) -> np.ndarray:
        """Five of each packed row, int32 `[B, T]`: the third is padding, before them too in all rows but the first."""
        position, row = np.arange(self.T, dtype=np.int32), np.arange(self.B)[:, None]
        ids = 1 + position * 5 // self.T
        return np.where((ids == 3) | (position < row * self.T // 2), 0, ids)

    @property
    def valid(self) -> int:
        """Tokens that are not padding."""
        if self.packed:
            return int(np.sum(self.segments > 0))
        return int(np.sum(self.lengths)) if self.ragged else self.B * self.T

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """Those of `lightning_attention`, and `d_out`, zero where o is undefined."""
        B, T, H, D = self.B, self.T, self.H, self.D
        found: dict[str, Any] = {
            "qkv": normal(1, (B, T, H, 3, D), self.dtype, 1),
            "log_decay": jnp.asarray(self.decay),
        }
        if self.layers:
            lead = (self.layers,) if self.layers > 1 else ()
            found["state"] = normal(2, (*lead, B, H, D, D), "float32", 1)
        if self.layers > 1:
            found["layer"] = jnp.asarray(1)
        if self.ragged:
            found["lengths"] = jnp.asarray(self.lengths)
        if self.packed:
            found["segments"] = jnp.asarray(self.segments)
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
        """Without o at padded tokens; each head apart, and q, k and v: those of slow decays outweigh all others."""
        if self.grad:
            found = outputs[0]
            by_head = [jnp.moveaxis(found["qkv"], (2, 3), (0, 1)).reshape(-1, self.B, self.T, self.D)]
            state = found.get("state")
        else:
            o, state = outputs
            by_head = [jnp.moveaxis(self._at_valid(arguments, o), 2, 0)]
        if state is not None:
            by_head.append(jnp.moveaxis(state, -3, 0))
        return [list(a) for a in by_head]

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
    LightningCase(
        name="backward of the first layer", T=UNEVEN, B=2, H=16, layers=3, of=0, ragged=True, grad=True, whole=True
    ),
    LightningCase(name="backward packed, uneven parts", T=UNEVEN, B=3, H=4, packed=True, grad=True, whole=True),
    LightningCase(name="backward head_dim 64", T=2048, D=64, layers=1, grad=True),
    LightningCase(name="backward head_dim 32", T=2048, D=32, layers=1, grad=True),
    LightningCase(name="backward float32", T=512, layers=1, dtype="float32", grad=True),
    # The states of one layer alone would stay in the cache at B = 1.
    *(LightningCase(name=f"decode B={B}", T=1, B=B, layers=32, must=must) for B, must in STEP.items()),
    LightningCase(name="decode float32", T=1, B=8, layers=2, dtype="float32"),
)
