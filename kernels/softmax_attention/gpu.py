"""Softmax attention on GPUs through libraries: cuDNN for many queries, jax's Pallas flash-decoding kernel for one."""

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from m1jax.kernels.gpu import capability, refusal

Form = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # of q, k, v and offset
Library = Literal["cudnn", "xla"]  # behind `jax.nn.dot_product_attention`; "xla" is for tests

LARGEST_MASK = 1 << 30  # bytes: cuDNN takes segments as [B, T, T] numbers of the dtype of q, in memory
OLDEST = 80  # compute capability with flash attention in cuDNN
_SPLITS, _BLOCK = 16, 128  # of the keys in a decode step: programs, and keys at a time at most
_DECODE = "jax.experimental.pallas.ops.gpu.decode_attention"
_FUSED = "jax._src.cudnn.fused_attention_stablehlo"


def refusal_of_cudnn(q: jax.Array, k: jax.Array, offset: jax.Array | None, segments: jax.Array | None) -> str | None:
    """Why cuDNN does not do this; None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"it takes bfloat16 or float16, q is {q.dtype} and k {k.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"it takes a head_dim of a multiple of 8 up to 256, not {q.shape[3]}"
    if segments is not None and offset is not None:
        return "it takes packed rows without an offset only"
    if segments is not None and q.shape[1] != k.shape[2]:
        return f"packed rows need T = N, got T {q.shape[1]} and N {k.shape[2]}"
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


def refusal_of_pallas(q: jax.Array, k: jax.Array, segments: jax.Array | None, interpreted: bool = False) -> str | None:
    """Why the Pallas kernel does not do this; None if it does."""
    T, D, N = q.shape[1], q.shape[3], k.shape[2]
    if T != 1 or segments is not None:
        return f"it decodes one token of unpacked rows, got {T} tokens"
    if D & (D - 1) or D < 16 or N % (_SPLITS * 16):
        return f"it takes a power of two as head_dim and a multiple of {_SPLITS * 16} as cache length, got {D} and {N}"
    if q.dtype != k.dtype:
        return f"q and k must have one dtype, got {q.dtype} and {k.dtype}"
    if not _exists(_DECODE):
        return f"needs {_DECODE}, which this jax does not have"
    return None if interpreted else refusal()


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


def pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    interpreted: bool = False,
    instead: Form | None = None,
) -> jax.Array:
    """One query a row, keys split among programs; shapes as in `reference.softmax_attention`, `instead` as above."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array) -> jax.Array:
        # Products of float32 would be of TF32.
        with warnings.catch_warnings(), jax.default_matmul_precision("highest"):
            # Pallas' Triton backend is deprecated; this is the one kernel of its kind that jax has.
            warnings.simplefilter("ignore", DeprecationWarning)
            kernel: Any = importlib.import_module(_DECODE)
            out = kernel.gqa(
                q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), kv_seq_len=offset + 1, k_splits=_SPLITS,
                block_k=math.gcd(_BLOCK, k.shape[2] // _SPLITS), interpret=interpreted,
            )  # fmt: skip
        return out[:, None].astype(v.dtype)

    why = "implementation: 'pallas' decodes and has no gradient: choose another"
    return _forward_only(run, why, instead)(q, k, v, offset)
