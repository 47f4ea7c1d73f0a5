"""Keys and values in pages, as vLLM's PagedAttention has them (Kwon et al., arXiv 2309.06180)."""

import jax
import jax.numpy as jnp


def in_order(x: jax.Array, pages: jax.Array | None, layer: jax.Array | int) -> jax.Array:
    """The keys or values of each row, one after another: `[B, K, n·P, D]` of one layer of `[S, R, K, P, D]`.

    `pages` integers `[B, n]`; None where they are in order already, `[S, B, K, N, D]`. Entries that are no page's
    number stand for some page.
    """
    if pages is None:
        return x[layer]
    _, R, K, P, D = x.shape
    B, n = pages.shape
    number = layer * R + jnp.clip(pages, 0, R - 1).astype(jnp.int32)
    at = number[:, None] * K + jnp.arange(K)[:, None]  # [B, K, n], of each head's part of each page
    return x.reshape(-1, P, D).at[at].get(mode="promise_in_bounds").reshape(B, K, n * P, D)


def one_each(k: jax.Array) -> jax.Array:
    """The pages of caches that are not in pages, `[S, B, K, N, D]`: one for each row, int32 `[B, 1]`."""
    return jnp.arange(k.shape[1], dtype=jnp.int32)[:, None]
