"""The cases of softmax attention: M1's heads; training and prefill, a later chunk of a prefill, decode, pages."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu.case import Case, Normal
from m1jax.kernels.softmax_attention.api import softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxCase(Case):
    """B rows of T queries and N keys, H heads of D channels, K key heads; with `cached` the last T of a cache of N.

    With `layers` it is the last of so many caches that is read, with `page` they are in pages of so many positions.
    """

    T: int
    N: int
    B: int = 1
    H: int = 64
    K: int = 8
    D: int = 128
    cached: bool = False
    packed: bool = False
    layers: int | None = None
    page: int | None = None

    def reduced(self) -> Self:
        """An even number of packed tokens, which cuDNN takes, and a cache that is read in several parts."""
        T, N = min(self.T, 70), 1280 if self.layers else 256
        return dataclasses.replace(self, T=T, N=N if self.cached else T, B=2, H=4, K=2)

    @property
    def forms(self) -> tuple[str, ...]:
        """The kernel that is meant for it."""
        return ("cudnn",) if self.layers is None else ("triton",)

    @property
    def matmul(self) -> bool:
        """Few queries are less than a warp group multiplies."""
        return self.layers is None

    @property
    def flop(self) -> float:
        """Of the two products, forward, where the mask lets through."""
        seen = self.T * (self.N - self.T) + self.T * self.T / 2
        return 4 * seen * self.B * self.H * self.D

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """Those of `softmax_attention`, and `d_out`."""
        B, T, N, row = self.B, self.T, self.N, jnp.arange(self.B)
        R, P = (B, N) if self.page is None else (B * N // self.page, self.page)
        q, kv = (B, T, self.H, self.D), (R, self.K, P, self.D)
        if self.layers is not None:
            kv = (self.layers, *kv)
        found: dict[str, Any] = {
            "q": normal(1, q, self.dtype, 1),
            "k": normal(2, kv, self.dtype, 1),
            "v": normal(3, kv, self.dtype, 1),
        }
        if self.cached:
            found["offset"] = (N - T) - row * (N - T) // B
        if self.layers is not None:
            found["layer"] = jnp.asarray(self.layers - 1)
        if self.page is not None:
            found["pages"] = jax.random.permutation(jax.random.key(5), R).astype(jnp.int32).reshape(B, N // P)
        if self.packed:
            found["segments"] = jnp.broadcast_to(1 + jnp.arange(N) * 3 // N, (B, N))
        if self.grad:
            found["d_out"] = normal(4, q, self.dtype, 1)
        return found

    def call(self, implementation: Any, arguments: dict[str, Any]) -> Any:
        """With `grad` output and gradients of q, k and v."""
        rest = dict(arguments)
        d_out = rest.pop("d_out", None)
        if not self.grad:
            return softmax_attention(**rest, implementation=implementation)
        wanted = {name: rest.pop(name) for name in ("q", "k", "v")}
        out, vjp = jax.vjp(lambda w: softmax_attention(**w, **rest, implementation=implementation), wanted)
        return out, vjp(d_out)


CASES = (
    *(SoftmaxCase(name=f"prefill {T}", T=T, N=T) for T in (8192, 32768, 131072)),
    *(SoftmaxCase(name=f"last quarter of {N}", T=N // 4, N=N, cached=True) for N in (8192, 32768, 131072)),
    *(
        SoftmaxCase(name=f"decode B={B} of {N}", T=1, N=N, B=B, cached=True, layers=2)
        for B, N in ((1, 32768), (32, 32768), (1, 2**20))
    ),
    SoftmaxCase(name="decode B=32 of 131072, one key head", T=1, N=131072, B=32, H=8, K=1, cached=True, layers=2),
    *(
        SoftmaxCase(name=f"decode B={B} of {N} in pages", T=1, N=N, B=B, cached=True, layers=2, page=256)
        for B, N in ((32, 32768), (1, 2**20))
    ),
    SoftmaxCase(name="four tokens after 32768", T=4, N=32768, cached=True, layers=2),
    SoftmaxCase(name="packed 8192", T=8192, N=8192, packed=True),
    SoftmaxCase(name="gradients 8192", T=8192, N=8192, grad=True),
    SoftmaxCase(name="gradients packed 8192", T=8192, N=8192, packed=True, grad=True),
    SoftmaxCase(name="uneven chunk", T=1000, N=2304, B=2, cached=True, whole=True),
)
