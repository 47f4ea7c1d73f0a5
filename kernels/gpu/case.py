"""Cases of an op: what `scripts/bench_gpu.py` times, `scripts/check_kernels.py` compiles and, reduced, the tests run.

Every op lists its own in `cases.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp

# (seed, shape, dtype, standard deviation) to random numbers; integers are uniform.
Normal = Callable[[int, tuple[int, ...], Any, float], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op.

    Attributes:
      name: unique among those of the op.
      dtype: of the activations.
      grad: gradients are meant, not the outputs alone.
      must: seconds that it may take on an H200.
      whole: checked on GPUs as it is, too, not only reduced.
    """

    name: str
    dtype: str = "bfloat16"
    grad: bool = False
    must: float | None = None
    whole: bool = False

    def reduced(self) -> Self:
        """The same at a size for Triton's interpreter, which no tile divides."""
        raise NotImplementedError

    def arguments(self, normal: Normal) -> dict[str, Any]:
        """What `call` takes."""
        raise NotImplementedError

    def call(self, implementation: Any, arguments: dict[str, Any]) -> Any:
        """The op's outputs, or with `grad` gradients of what has one."""
        raise NotImplementedError

    def defined(self, arguments: dict[str, Any], outputs: Any) -> Any:
        """What `call` returned, zero where it is undefined: what implementations are compared by."""
        return outputs

    @property
    def forms(self) -> tuple[str, ...]:
        """The GPU implementations that do it, the fastest first."""
        return ("triton",)

    @property
    def matmul(self) -> bool:
        """Whether its kernels must use tensor cores."""
        return self.dtype == "bfloat16"

    def abstract(self) -> dict[str, Any]:
        """`arguments` without values."""
        return jax.eval_shape(lambda: self.arguments(lambda _, shape, dtype, scale: jnp.zeros(shape, dtype)))


Cases = TypeVar("Cases", bound=Case)


def reduced(cases: Iterable[Cases]) -> list[Cases]:
    """Each case reduced; of those that are then alike the first."""
    found: dict[Case, Cases] = {}
    for case in cases:
        small = dataclasses.replace(case.reduced(), must=None, whole=False)
        found.setdefault(dataclasses.replace(small, name=""), small)
    return list(found.values())
