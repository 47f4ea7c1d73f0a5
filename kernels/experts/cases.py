"""The cases of the experts: M1's shapes, training, prefill and decode."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from m1jax.kernels.experts.api import experts
from m1jax.kernels.experts.gpu import FEW, default_form, refusal_of_mosaic
from m1jax.kernels.experts.quantized import Quantization, Quantized, stored_shapes
from m1jax.kernels.gpu.case import Case, Normal

PEAK = 989e12  # bfloat16 FLOP a second of an H100 or H200, by the data sheet
PREFILL_SHARE = 0.65  # of it that a prefill of 8,192 tokens must reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsCase(Case):
    """N tokens of M channels, each by k of E experts of width F, whose weights are one of `layers` layers'.

    `kind`: how the weights are stored, None for the dtype of the activations; `down`: of those where they differ.
    `padding`: a token chooses nobody.
    """

    N: int
    kind: Quantization | None = None
    down: Quantization | Literal["float", "alike"] = "alike"
    E: int = 32
    F: int = 9216
    M: int = 6144
    k: int = 2
    layers: int = 2
    padding: bool = False

    def reduced(self) -> Self:
        """int4 groups of 32 and 128; rows found and tiles chosen as for the whole case, or nearly.

        No tile divides F, of which Mosaic's form needs whole 64s.
        """
        N = min(self.N, 8 if self.N * self.k <= FEW else 200)
        E = 2 * N * self.k if self.single else 4
        return dataclasses.replace(
            self, N=N, E=E, F=192 if "mosaic" in self.forms else 96, M=256, layers=2, padding=N > 2
        )

    @property
    def forms(self) -> tuple[str, ...]:
        """Mosaic's too, for the rows of a prefill, without gradients."""
        a = self.abstract()
        few = self.N * self.k < self.E * 32  # for blocks of 64 rows
        unfit = self.grad or few or refusal_of_mosaic(a["gate_up"], a["down"])
        return ("triton",) if unfit else ("triton", "mosaic")

    @property
    def matmul(self) -> bool:
        """A few rows are multiplied by int8 weights on the ordinary cores, as is float32."""
        return self.dtype == "bfloat16" and not (self.single and not self.grad)

    @property
    def kinds(self) -> tuple[Quantization | None, Quantization | None]:
        """How gate_up and down are stored."""
        if self.down == "alike":
            return self.kind, self.kind
        return self.kind, None if self.down == "float" else self.down

    @property
    def single(self) -> bool:
        """Whether rows are multiplied one by one."""
        gate_up, down = (int(kind[3:]) if kind else 0 for kind in self.kinds)
        return default_form(self.N * self.k, self.E, jnp.dtype(self.dtype), (gate_up, down)).gate_up.rows == 1

    @property
    def flop(self) -> int:
        """Of the forward products."""
        return 6 * self.N * self.k * self.F * self.M

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """Those of `experts`, and `d_out`; experts and shares are uniformly random."""
        lead = (self.layers, self.E)
        shares = jax.lax.top_k(self._uniform(), self.k)[0]
        found: dict[str, Any] = {
            "x": normal(5, (self.N, self.M), self.dtype, 1),
            "gate_up": self._stack(normal, 1, self.kinds[0], (*lead, 2, self.F, self.M)),
            "down": self._stack(normal, 2, self.kinds[1], (*lead, self.M, self.F)),
            "chosen": self.drawn(),
            "weights": shares,
            "layer": jnp.asarray(self.layers - 1),
        }
        if self.grad:
            found["d_out"] = normal(6, (self.N, self.M), "float32", 1)
        return found

    def _uniform(self) -> jax.Array:
        return jax.random.uniform(jax.random.key(self.N), (self.N, self.E))

    def drawn(self) -> jax.Array:
        """The experts of each token, int32 `[N, k]`."""
        chosen = jax.lax.top_k(self._uniform(), self.k)[1].astype(jnp.int32)
        return chosen.at[1].set(self.E) if self.padding else chosen

    def _stack(self, normal: Normal, seed: int, kind: Quantization | None, shape: tuple[int, ...]) -> Any:
        scale = shape[-1] ** -0.5  # about the spread of trained weights
        if kind is None:
            return normal(seed, shape, self.dtype, scale)
        values, scales = stored_shapes(kind, shape)
        stored, largest = ("int8", 127) if kind == "int8" else ("uint8", 7)
        return Quantized(normal(seed, values, stored, 1), jnp.full(scales, scale / largest, jnp.float32))

    def call(self, implementation: Any, arguments: dict[str, Any]) -> Any:
        """With `grad` output and gradients: of x and shares, and of weights that are not quantised."""
        rest = dict(arguments)
        d_out = rest.pop("d_out", None)
        if not self.grad:
            return experts(**rest, implementation=implementation)
        names = [name for name, kind in zip(("gate_up", "down"), self.kinds, strict=True) if kind is None]
        wanted = {name: rest.pop(name) for name in ("x", "weights", *names)}
        out, vjp = jax.vjp(lambda w: experts(**w, **rest, implementation=implementation), wanted)
        return out, vjp(d_out)


def _decode(N: int, kind: Quantization | None) -> ExpertsCase:
    return ExpertsCase(name=f"decode {kind or 'bfloat16'} B={N}", N=N, kind=kind)


PREFILL = ExpertsCase(name="bfloat16 8192 tokens", N=8192)
KINDS: tuple[Quantization | None, ...] = (None, "int8", "int4")

CASES = (
    dataclasses.replace(PREFILL, must=PREFILL.flop / (PREFILL_SHARE * PEAK)),
    ExpertsCase(name="int8 8192 tokens", N=8192, kind="int8"),
    ExpertsCase(name="int4 8192 tokens", N=8192, kind="int4"),
    *(ExpertsCase(name=f"{kind or 'bfloat16'} 1024 tokens", N=1024, kind=kind) for kind in KINDS),
    *(ExpertsCase(name=f"{kind or 'bfloat16'} 32768 tokens", N=32768, kind=kind) for kind in KINDS),
    # 128 tokens are the most whose rows each program finds on its own; 160 are sorted, in narrow tiles.
    *(_decode(N, kind) for kind in KINDS for N in (1, 8, 32, 128, 160)),
    ExpertsCase(name="gradients 8192 tokens", N=8192, layers=1, grad=True),
    ExpertsCase(name="gradients 1024 tokens", N=1024, layers=1, grad=True),
    ExpertsCase(name="gradients int8 8192 tokens", N=8192, kind="int8", grad=True),
    ExpertsCase(name="gradients int4 8192 tokens", N=8192, kind="int4", grad=True),
    ExpertsCase(name="gradients float32 1024 tokens", N=1024, layers=1, dtype="float32", grad=True),
    # Stored otherwise than the activations, or than each other: to compile and to check, none is a goal.
    *(
        ExpertsCase(name=f"float32, {kind} B={N}", N=N, kind=kind, dtype="float32")
        for kind in KINDS[1:]
        for N in (1, 8192)
    ),
    *(
        ExpertsCase(name=f"gradients float32, {k} 1024 tokens", N=1024, kind=k, dtype="float32", grad=True)
        for k in KINDS[1:]
    ),
    *(ExpertsCase(name=f"float and int4 B={N}", N=N, down="int4") for N in (1, 8192)),
    *(ExpertsCase(name=f"int8 and int4 B={N}", N=N, kind="int8", down="int4") for N in (1, 8192)),
    *(ExpertsCase(name=f"int4 and float B={N}", N=N, kind="int4", down="float") for N in (1, 8192)),
)
