"""Few rows times one matrix of a stack on Hopper, by Triton: while decoding, all the time goes into reading the matrix.

XLA would first copy the matrix out of the stack, or several matrices that are multiplied by the same rows side by side,
which triples what is read and written.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu import launch
from m1jax.kernels.gpu.tiles import MULTIPROCESSORS, Tiles

MOST_ROWS = 256  # beyond, the copy is small beside the product


def default_tiles(N: int, O: int, I: int) -> Tiles:
    """For N rows, O channels out and I in; sums are shared where there are too few blocks of channels."""
    if N == 1:  # on the ordinary cores, by programs of one warp that reads 512 bytes of a row of the matrix at once
        tiles, enough, most = Tiles(1, 8, 256, 1, 1), 8 * MULTIPROCESSORS, 4
    else:
        rows = min(max(16, 1 << (N - 1).bit_length()), 128)
        tiles, enough, most = Tiles(rows, 64, 128, 4, 4 if rows <= 64 else 3), 2 * MULTIPROCESSORS, 16
    programs, split = -(-O // tiles.out) * -(-N // tiles.rows), 1
    while programs * split < enough and I % (2 * split * tiles.inner) == 0 and split < most:
        split *= 2
    return dataclasses.replace(tiles, split=split)


def refusal(x: jax.Array, stack: jax.Array) -> str | None:
    """Why this kernel does not take such arrays; None if it does."""
    if x.dtype != jnp.bfloat16 or stack.dtype != jnp.bfloat16:
        return f"takes bfloat16, got x of {x.dtype} and stack of {stack.dtype}"
    if x.shape[0] > MOST_ROWS:
        return f"takes up to {MOST_ROWS} rows, got {x.shape[0]}"
    return None


def product(
    x: jax.Array, stack: jax.Array, layer: jax.Array | int, tiles: Tiles | None = None, interpreted: bool = False
) -> jax.Array:
    """Arguments and result as of `reference.linear`; `tiles` None chooses by shape."""
    from m1jax.kernels.linear import kernels

    (N, I), (L, O, _) = x.shape, stack.shape
    tiles = tiles or default_tiles(N, O, I)
    rows: dict[str, Any] = {"N": N, "R": tiles.rows} if tiles.rows > 1 else {}
    (out,) = launch(
        kernels.forward if rows else kernels.forward_of_row, x, stack, jnp.asarray(layer, jnp.int32).reshape(1),
        out=[jax.ShapeDtypeStruct((tiles.split, N, O), jnp.float32)],
        grid=(-(-N // tiles.rows), -(-O // tiles.out), tiles.split), warps=tiles.warps, stages=tiles.stages,
        interpreted=interpreted, O=O, I=I, L=L, **rows, BO=tiles.out, BI=tiles.inner, SPLIT=tiles.split,
    )  # fmt: skip
    return jnp.sum(out, axis=0)
