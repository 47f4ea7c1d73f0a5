"""The factors that are trained: which matrices have them, their shapes, and the model that they are put into.

They are a tree like the model's own, `{"lightning": {"qkv_proj": {"lora_a": …, "lora_b": …}}}`, float32.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.lora.adapted import IN_AXES, A, Adapted, B, factor_axes
from m1jax.model import M1
from m1jax.params import ParamSpec, nest, param_table

Factors = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What has factors: `targets` are paths of parameters, in their order there."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A counts."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, config: M1Config, rank: int, alpha: float, patterns: Sequence[str]) -> "Lora":
        """Factors of the matrices that patterns such as "softmax.*" name, as far as the model has them.

        Raises `UserError` if a pattern names no matrix that could have factors, or the model has none of them.
        """
        for pattern in patterns:
            if not fnmatch.filter(IN_AXES, pattern):
                raise UserError(
                    f"lora.targets: {pattern!r} names no matrix that can have factors: {', '.join(IN_AXES)}"
                )
        there = [path for path in IN_AXES if 0 not in param_table(config)[path].shape]
        targets = tuple(path for path in there if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns))
        if not targets:
            raise UserError(f"lora.targets = {list(patterns)} are none of this model's: {', '.join(there)}")
        return cls(rank, alpha, targets)

    def table(self, config: M1Config) -> dict[str, ParamSpec]:
        """Every factor by its path, e.g. "softmax.q_proj.lora_a"; at first B is 0, and A as large as PEFT's."""
        out = {}
        for path in self.targets:
            spec, inputs = param_table(config)[path], IN_AXES[path]
            (n, *channels), axes = spec.shape, factor_axes(spec.axes, inputs)
            outer, inner = channels[:-inputs], channels[-inputs:]
            out[f"{path}.{A}"] = ParamSpec((n, self.rank, *inner), axes[A], (3 * math.prod(inner)) ** -0.5)
            out[f"{path}.{B}"] = ParamSpec((n, *outer, self.rank), axes[B], 0.0)
        return out

    def build(self, config: M1Config, leaf: Callable[[str, ParamSpec], Any]) -> Factors:
        """The tree whose leaves are `leaf(path, spec)`."""
        return nest({path: leaf(path, spec) for path, spec in self.table(config).items()})

    def abstract(self, config: M1Config) -> Factors:
        """The factors without their numbers."""
        return self.build(config, lambda _, spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32))

    def init(self, config: M1Config, key: jax.Array) -> Factors:
        """Factors that change nothing yet."""
        keys = iter(jax.random.split(key, 2 * len(self.targets)))

        def leaf(_: str, spec: ParamSpec) -> jax.Array:
            assert spec.init is not None
            return spec.init * jax.random.normal(next(keys), spec.shape, jnp.float32)

        return self.build(config, leaf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Base:
    """A model that is not trained itself, and what the product of factors beside its matrices counts."""

    model: M1
    scale: float = dataclasses.field(metadata={"static": True})

    def with_factors(self, factors: Factors) -> M1:
        """The model that computes with both."""
        groups = {}
        for group, matrices in factors.items():
            module, changed = getattr(self.model, group), {}
            for name, pair in matrices.items():
                param: nnx.Param = getattr(module, name)
                changed[name] = nnx.Param(Adapted(param[...], pair[A], pair[B], self.scale), axes=param.axes)
            groups[group] = dataclasses.replace(module, **changed)
        return dataclasses.replace(self.model, **groups)
