"""Lightning attention token by token, each as decoding computes it: T steps, one after the other.

What it is for: in bfloat16 values that differ by a rounding of float32 sums are now and then rounded to different
numbers, which all later tokens read. A policy that is trained so agrees with its rollout bit by bit.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from m1jax.kernels.segments import valid_and_starts

# (qkv, log_decay, state, lengths, segments) -> out, state
Form = Callable[..., tuple[jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_token(
    form: Form,
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.lightning_attention`, by a form that is given one token at a time; its gradient for all."""
    valid, begins = valid_and_starts(lengths, qkv.shape[1], segments)

    def one(s: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        token, count, new = inputs
        if segments is not None:
            s = jnp.where(new[:, None, None, None], 0.0, s)
        out, s = form(token[:, None], log_decay, s, count, None)
        return s, out[:, 0]

    inputs = (jnp.moveaxis(qkv, 1, 0), valid.T.astype(jnp.int32), begins.T)
    state, out = lax.scan(one, state, inputs)
    return jnp.moveaxis(out, 0, 1), state


def _forward(form: Form, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    return by_token(form, *arrays), arrays


def _backward(
    form: Form, arrays: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    qkv, log_decay, state, *rest = arrays
    _, gradient = jax.vjp(lambda qkv, state: form(qkv, log_decay, state, *rest), qkv, state)
    d_qkv, d_state = gradient(cotangents)
    return d_qkv, None, d_state, None, None


by_token.defvjp(_forward, _backward)
