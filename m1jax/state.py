"""What a sequence leaves behind: the state that `m1jax.model.M1.step` takes and returns. Letters as there."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from m1jax.params import STATE_AXES
from m1jax.sharding.region import after, laid_out, mesh_in_use, on_mesh, on_mesh_of, rows_of


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
        return take_rows((self,), jnp.asarray(rows))


def take_rows(states: Sequence[M1State], rows: jax.Array) -> M1State:
    """The given rows `[B']` of states whose caches have one length, one after the other, each where its device is.

    One layer at a time: beside the states and the result there is little else.
    """
    axes = [STATE_AXES[name] for name in ("length", "lightning.s", "cache.k", "cache.v")]
    n = len(states)

    def local(rows: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out: list[jax.Array] = []
        for names, at in zip(axes, range(0, len(arrays), n), strict=True):
            rows = after(rows, *out[-1:])
            parts = arrays[at : at + n]
            if names[0] == "batch":
                out.append(rows_of(parts, rows))
            else:
                out.append(lax.map(lambda parts, rows=rows: rows_of(parts, rows), parts))
        return tuple(out)

    # The length first: it is there when all else is.
    leaves = zip(*((x.length, x.lightning.s, x.cache.k, x.cache.v) for x in states), strict=True)
    named = {f"state {k}.{i}": names for k, names in enumerate(axes) for i in range(n)}
    with on_mesh_of(states[0].length):
        run = on_mesh(local, None, tuple(axes), rows=("batch",), **named)
        length, s, k, v = run(rows, *itertools.chain(*leaves))
    return M1State(LightningState(s), KVCache(k, v), length)


STATE: Any = M1State(
    LightningState(STATE_AXES["lightning.s"]),  # pyright: ignore[reportArgumentType]
    KVCache(STATE_AXES["cache.k"], STATE_AXES["cache.v"]),  # pyright: ignore[reportArgumentType]
    STATE_AXES["length"],  # pyright: ignore[reportArgumentType]
)


def empty(lightning: tuple[int, ...], cache: tuple[int, ...], dtype: DTypeLike) -> M1State:
    """Zeros of these shapes, that nothing was read into; on a mesh, where one is in use."""
    # There each device makes its own part: one alone might have no room for all of it.
    return (_zeros if mesh_in_use() is None else _zeros_on_mesh)(lightning, cache, dtype)


def _zeros(lightning: tuple[int, ...], cache: tuple[int, ...], dtype: DTypeLike) -> M1State:
    kv = jnp.zeros(cache, dtype)
    state, length = jnp.zeros(lightning, jnp.float32), jnp.zeros(lightning[1:2], jnp.int32)
    zeros = M1State(LightningState(state), KVCache(kv, jnp.zeros_like(kv)), length)
    return jax.tree.map(
        lambda axes, x: laid_out(x, "state", axes), STATE, zeros, is_leaf=lambda x: isinstance(x, tuple)
    )


_zeros_on_mesh = jax.jit(_zeros, static_argnums=(0, 1, 2))
