"""What a sequence leaves behind: the state that `m1jax.model.M1.step` takes and returns. Letters as there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from m1jax.config import M1Config
from m1jax.params import STATE_AXES
from m1jax.sharding.region import after, laid_out, mesh_in_use, on_mesh, on_mesh_of, rows_of

PAGE = 256  # tokens that a page of the engine's has room for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningState:
    """S of every lightning layer: `s` float32 `[P, B, H, D, D]` (key channel, value channel)."""

    s: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every softmax layer, in the compute dtype.

    `k`, `v` `[S, B, K, N, D]`; or, in pages, `[S, R, K, P, D]`: R of them with room for P tokens of one row each.
    """

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class M1State:
    """What a sequence leaves behind: lightning states, softmax caches, and the number of tokens seen, int32 `[B]`.

    Where the caches are in pages, `pages` int32 `[B, n]` says which belong to each row: what is of position p lies in
    page pages[b, p // P], at p % P; where there is no page of that number nothing is kept. On a mesh that splits rows
    each of their parts has R / parts pages, and the numbers are those among them; one that splits the tokens of a
    sequence splits those of each page, and a row has one page.
    """

    lightning: LightningState
    cache: KVCache
    length: jax.Array
    pages: jax.Array | None = None

    @property
    def max_length(self) -> int:
        """How many tokens of a row fit in the cache."""
        return self.cache.k.shape[3] * (1 if self.pages is None else self.pages.shape[1])

    def take(self, rows: ArrayLike | Sequence[int]) -> "M1State":
        """The state of the given rows, integers `[B']`, in that order; rows may repeat.

        Raises:
          ValueError: the caches are in pages.
        """
        if self.pages is not None:
            raise ValueError("state: rows in pages cannot be copied: give each row pages of its own")
        return _taken(self, jnp.asarray(rows))


def _taken(state: M1State, rows: jax.Array) -> M1State:
    """`M1State.take`, on a mesh each row where its device is.

    One layer at a time: beside the state and the result there is little else.
    """
    axes = tuple(STATE_AXES[name] for name in ("length", "lightning.s", "cache.k", "cache.v"))

    def local(rows: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out: list[jax.Array] = []
        for names, x in zip(axes, arrays, strict=True):
            rows = after(rows, *out[-1:])
            if names[0] == "batch":
                out.append(rows_of(x, rows))
            else:
                out.append(lax.map(lambda layer, rows=rows: rows_of(layer, rows), x))
        return tuple(out)

    # The length first: it is there when all else is.
    named = {f"state {i}": names for i, names in enumerate(axes)}
    with on_mesh_of(state.length):
        run = on_mesh(local, None, axes, rows=("batch",), **named)
        length, s, k, v = run(rows, state.length, state.lightning.s, state.cache.k, state.cache.v)
    return M1State(LightningState(s), KVCache(k, v), length)


STATE: Any = M1State(
    LightningState(STATE_AXES["lightning.s"]),  # pyright: ignore[reportArgumentType]
    KVCache(STATE_AXES["cache.k"], STATE_AXES["cache.v"]),  # pyright: ignore[reportArgumentType]
    STATE_AXES["length"],  # pyright: ignore[reportArgumentType]
)


def empty(config: M1Config, dtype: DTypeLike, rows: int, pages: int, page: int) -> M1State:
    """The state of so many rows before the first token, with so many pages for so many tokens each.

    A state that is not in pages has one for each row. On a mesh, where one is in use.
    """
    # There each device makes its own part: one alone might have no room for all of it.
    return (_zeros if mesh_in_use() is None else _zeros_on_mesh)(config, dtype, rows, pages, page)


def _zeros(config: M1Config, dtype: DTypeLike, rows: int, pages: int, page: int) -> M1State:
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    kv = jnp.zeros((len(config.softmax_layers), pages, K, page, D), dtype)
    states = jnp.zeros((len(config.lightning_layers), rows, H, D, D), jnp.float32)
    zeros = M1State(LightningState(states), KVCache(kv, jnp.zeros_like(kv)), jnp.zeros((rows,), jnp.int32))
    return jax.tree.map(
        lambda axes, x: laid_out(x, "state", axes), STATE, zeros, is_leaf=lambda x: isinstance(x, tuple)
    )


_zeros_on_mesh = jax.jit(_zeros, static_argnums=(0, 1, 2, 3, 4))
