"""Softmax attention on GPUs: cuDNN for many queries, a Triton kernel for few against a cache.

Libraries have kernels for one query (flash-decoding), too: jax's are deprecated since jax 0.12, and like others take
the keys and values of one layer, which XLA would first copy out of the stack, three times the traffic. They cut the
cache into parts by its room, not by how much of it a row has filled, and round what each part gives to bfloat16.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu import capability, launch, refusal
from m1jax.kernels.rounding import rounded

Form = Callable[..., Any]  # of q, k, v, offset and, where k and v are of several layers, layer and pages
Library = Literal["cudnn", "xla"]  # behind `jax.nn.dot_product_attention`; "xla" is for tests

LARGEST_MASK = 1 << 30  # bytes: cuDNN takes segments as [B, T, T] numbers of the dtype of q, in memory
OLDEST = 80  # compute capability with flash attention in cuDNN
MOST_QUERIES = 64  # of the Triton kernel, of one key head
_SHORTEST = 512  # keys of a part, of a full cache
_PROGRAMS, _MOST_SPLITS = 1024, 256  # as many parts as give so many programs at least, several a multiprocessor
_FUSED = "jax._src.cudnn.fused_attention_stablehlo"


def refusal_of_cudnn(q: jax.Array, k: jax.Array, offset: jax.Array | None, segments: jax.Array | None) -> str | None:
    """Why cuDNN does not do this; None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"it takes bfloat16 or float16, q is {q.dtype} and k {k.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"it takes a head_dim of a multiple of 8 up to 256, not {q.shape[3]}"
    if segments is not None and offset is not None:
        return "it takes packed rows without an offset only"
    if segments is not None and q.shape[1] != k.shape[-2]:
        return f"packed rows need T = N, got T {q.shape[1]} and N {k.shape[-2]}"
    if segments is not None and (mask := q.shape[0] * q.shape[1] ** 2 * q.dtype.itemsize) > LARGEST_MASK:
        return f"packed rows are a mask of B·T² numbers, here {mask / 1e9:.1f} GB, more than {LARGEST_MASK / 1e9:.1f}"
    if segments is not None and q.shape[1] % 2:
        return f"packed rows need an even number of tokens for a gradient, got {q.shape[1]}"
    if offset is not None and not _exists(_FUSED):
        return f"attention into a cache needs {_FUSED}, which this jax does not have"
    device = capability()
    if device is None or jax.default_backend() != "gpu":
        return "needs a machine with a CUDA device"
    if 0 < device < OLDEST or (0 < device < 90 and q.shape[3] > 128):
        return f"it takes compute capability 8.0 or later, and 9.0 for a head_dim above 128, not {device / 10}"
    return None


def refusal_of_triton(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, pages: jax.Array | None, interpreted: bool = False
) -> str | None:
    """Why the Triton kernel does not do this; None if it does."""
    (_, T, H, D), K = q.shape, k.shape[-3]
    if segments is not None:
        return "it takes no packed rows"
    if T * (H // K) > MOST_QUERIES:
        return f"it takes up to {MOST_QUERIES} queries a key head, got {T} tokens of {H // K} heads each"
    if D & (D - 1) or not 16 <= D <= 256:
        return f"it takes a power of two from 16 to 256 as head_dim, got {D}"
    if pages is not None and pages.shape[1] > 1 and k.shape[-2] % _at_a_time(k):
        return f"it takes pages of a multiple of {_at_a_time(k)} positions, got {k.shape[-2]}"
    return None if interpreted else refusal()


def _at_a_time(k: jax.Array) -> int:
    """Keys that the Triton kernel has at once."""
    # Products of float32 are made on the ordinary cores, of operands in registers.
    most_bytes = 8192 if k.dtype == jnp.float32 else 16384
    return min(128, max(16, most_bytes // (k.shape[-1] * k.dtype.itemsize)))


@functools.cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it was in
        return False


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array | None,
    segments: jax.Array | None,
    library: Library = "cudnn",
    instead: Form | None = None,
) -> jax.Array:
    """Shapes as in `reference.softmax_attention`; offset None is zero, and else a gradient is that of `instead`."""
    T = q.shape[1]
    if offset is not None:
        why = "offset: cuDNN attention into a cache has no gradient; train without a state"
        return _forward_only(functools.partial(_into_cache, library=library), why, instead)(q, k, v, offset)
    k, v = (a[:, :, :T].swapaxes(1, 2) for a in (k, v))
    mask = None
    if segments is not None:
        own = segments[:, :T]
        mask = (own[:, :, None] == own[:, None])[:, None]  # [B, 1, T, T]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=library)


def _forward_only(fn: Form, why: str, instead: Form | None) -> Form:
    """`fn`; where a gradient is taken `instead` is run, without which it raises `ValueError`."""
    out = jax.custom_vjp(fn)

    def forward(*arrays: jax.Array) -> Any:
        return (fn(*arrays), None) if instead is None else jax.vjp(instead, *arrays)

    def backward(undo: Any, d_out: jax.Array) -> Any:
        if undo is None:
            raise ValueError(why)
        return undo(d_out)

    out.defvjp(forward, backward)
    return out


def _into_cache(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array, library: Library) -> jax.Array:
    """Queries from position offset[b] on: attention to all keys before, and causal attention among the new tokens.

    cuDNN's causal mask starts at the first key. So the two parts are computed apart and put together by the logarithms
    of their sums of exponentials.
    """
    T = q.shape[1]
    # A slice would be moved where padding reaches past the end of the cache.
    position = jnp.minimum(offset[:, None] + jnp.arange(T), k.shape[2] - 1)
    new_k, new_v = (jax.vmap(lambda a, at: a[:, at])(a, position).swapaxes(1, 2) for a in (k, v))
    old = jnp.maximum(offset, 1).astype(jnp.int32)
    among, log_among = _with_log_sums(q, new_k, new_v, None, library)
    before, log_before = _with_log_sums(q, k.swapaxes(1, 2), v.swapaxes(1, 2), old, library)
    some = (offset > 0)[:, None, None]
    share = jnp.where(some, jax.nn.sigmoid(log_before - log_among), 0.0).swapaxes(1, 2)[..., None]
    before = jnp.where(some[..., None], before, 0).astype(jnp.float32)
    out = before * share + among.astype(jnp.float32) * (1 - share)
    return out.astype(v.dtype)


def _with_log_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, library: Library
) -> tuple[jax.Array, jax.Array]:
    """Attention to the first `lengths` keys of each row, causal if None: `[B, T, H, D]`, and float32 `[B, H, T]`.

    k, v `[B, N, K, D]`. The second are logarithms of sums of exponentials, which `jax.nn.dot_product_attention` would
    round to the dtype of q: of two such the difference is off by several hundredths.
    """
    B, T = q.shape[:2]
    if library == "xla":
        out, log_sums = jax.nn.dot_product_attention(
            *(a.astype(jnp.float32) for a in (q, k, v)), is_causal=lengths is None, key_value_seq_lengths=lengths,
            return_residual=True,
        )  # fmt: skip
        return out.astype(q.dtype), log_sums.swapaxes(1, 2)
    fused: Any = importlib.import_module(_FUSED)
    mask = fused.MaskType.CAUSAL if lengths is None else fused.MaskType.PADDING
    queries = None if lengths is None else jnp.full((B,), T, jnp.int32)
    return fused.dot_product_attention(
        q, k, v, q_seqlen=queries, kv_seqlen=lengths, scale=q.shape[3] ** -0.5, mask_type=mask, return_residual=True
    )


def few_queries(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    layer: jax.Array | int,
    pages: jax.Array,
    interpreted: bool = False,
    instead: Form | None = None,
) -> jax.Array:
    """By Triton; k, v `[S, R, K, P, D]` and pages as in the API, else as in `reference.softmax_attention`.

    `instead` as above.
    """

    def run(*arrays: jax.Array) -> jax.Array:
        return rounded(_over_part(*arrays, interpreted=interpreted)[0], v.dtype)

    why = "implementation: 'triton' has no gradient: choose another"
    return _forward_only(run, why, instead)(q, k, v, offset, jnp.asarray(layer, jnp.int32), pages)


def over_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    layer: jax.Array | int,
    pages: jax.Array,
    interpreted: bool,
    instead: Form,
) -> tuple[jax.Array, jax.Array]:
    """As `api.over_part`, by Triton; `instead` as above."""
    run = functools.partial(_over_part, interpreted=interpreted)
    return _forward_only(run, "", instead)(q, k, v, offset, jnp.asarray(layer, jnp.int32), pages)


def _over_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    layer: jax.Array,
    pages: jax.Array,
    interpreted: bool,
) -> tuple[jax.Array, jax.Array]:
    from m1jax.kernels.softmax_attention import kernels

    (B, T, H, D), (L, R, K, P, _) = q.shape, k.shape
    n = pages.shape[1]
    splits = _splits(B * K, n * P)
    outs, log_sums = launch(
        kernels.few_queries, q, k, v, offset, layer.reshape(1), pages.astype(jnp.int32),
        out=[jax.ShapeDtypeStruct((splits, *shape), jnp.float32) for shape in (q.shape, q.shape[:3])],
        grid=(splits, K, B), warps=8 if q.dtype == jnp.float32 else 4, interpreted=interpreted,
        stages=3 if n == 1 else 5,  # as many blocks on their way, though a block's page is fetched first
        LAYERS=L, R=R, PAGES=n, B=B, T=T, H=H, K=K, P=P, D=D, ROWS=max(16, 1 << (T * (H // K) - 1).bit_length()),
        BLOCK=_at_a_time(k), SPLITS=splits, PRECISION="ieee" if q.dtype == jnp.float32 else "tf32",
    )  # fmt: skip
    most = jnp.max(log_sums, axis=0)
    shares = jnp.exp(log_sums - jnp.where(jnp.isneginf(most), 0.0, most))
    total = jnp.sum(shares, axis=0)
    out = jnp.sum(outs * shares[..., None], axis=0) / jnp.where(total == 0, 1.0, total)[..., None]
    return out, most + jnp.log(total)


def _splits(rows: int, N: int) -> int:
    """In how many parts to cut the keys of each of so many rows and key heads."""
    splits = 1
    while rows * splits < _PROGRAMS and splits < _MOST_SPLITS and 2 * splits * _SHORTEST <= N:
        splits *= 2
    return splits
