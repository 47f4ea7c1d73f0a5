"""Packed rows against separate ones, and gradients against references: ops, model, and transformers' own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.lightning_attention import lightning_attention, log_decay
from m1jax.kernels.softmax_attention import softmax_attention
from m1jax.kernels.softmax_attention import xla as softmax_xla
from m1jax.params import flatten
from tests import numpy_m1
from tests.test_kernels import normal
from tests.tools import SMALL, random_model, rms_error, variant

# Lengths of the sequences in each row of 300; the rest of a row is padding, 0 is padding between two sequences.
ROWS = [[130, 1, 100, 69], [5, 250]]
WIDTH = 300


def segments_of(rows: list[list[int]], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.int32)
    for row, lengths in zip(out, rows, strict=True):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(ids)] = ids[: len(row)]
    return out


def pieces(rows: list[list[int]]) -> list[tuple[int, int, int]]:
    """(row, first, last + 1) of every sequence."""
    return [(b, sum(r[:i]), sum(r[: i + 1])) for b, r in enumerate(rows) for i in range(len(r))]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_lightning_attention_of_packed_rows(implementation: Any) -> None:
    """Each segment as in a row of its own, values and gradients; chunks have 128 tokens, so segments begin inside."""
    H, D = 2, 8
    decay, qkv = jnp.asarray(log_decay(H, 2, 9)), normal(0, 2, WIDTH, H, 3, D)
    segments = jnp.asarray(segments_of(ROWS, WIDTH))
    weight = jnp.where(segments[..., None, None] > 0, normal(1, 2, WIDTH, H, D), 0)
    end = normal(2, 2, H, D, D)

    def packed(qkv: jax.Array) -> Any:
        out, state = lightning_attention(qkv, decay, segments=segments, implementation=implementation)
        return jnp.vdot(out, weight) + jnp.vdot(state, end), (out, state)

    def separate(qkv: jax.Array) -> Any:
        total, outs = jnp.zeros(()), []
        for b, first, last in pieces(ROWS):
            out, state = lightning_attention(qkv[b : b + 1, first:last], decay, implementation="reference")
            total += jnp.vdot(out, weight[b, first:last])
            if last == sum(ROWS[b]):  # the state after a row is that of its last sequence
                total += jnp.vdot(state, end[b])
            outs.append(out[0])
        return total, outs

    (value, (out, _)), gradient = jax.value_and_grad(packed, has_aux=True)(qkv)
    (want, outs), want_gradient = jax.value_and_grad(separate, has_aux=True)(qkv)
    for (b, first, last), piece in zip(pieces(ROWS), outs, strict=True):
        assert rms_error(out[b, first:last], piece) < 2e-6
    assert value == pytest.approx(float(want), rel=1e-5)
    assert rms_error(gradient, want_gradient) < 1e-5


def test_lightning_attention_of_packed_rows_goes_on_with_a_state() -> None:
    """In two parts, cut inside a segment, with padding in the middle of a row: the second part goes on."""
    H, D, T = 2, 8, 200
    segments = np.zeros((1, T), np.int32)
    segments[0, 20:60], segments[0, 70:150], segments[0, 150:190] = 3, 1, 2
    decay, qkv, state = jnp.asarray(log_decay(H, 0, 2)), normal(0, 1, T, H, 3, D), normal(1, 1, H, D, D)
    for implementation in ("reference", "xla"):
        whole, end = lightning_attention(
            qkv, decay, state=state, segments=jnp.asarray(segments), implementation=implementation
        )
        a, middle = lightning_attention(qkv[:, :100], decay, state=state, segments=jnp.asarray(segments[:, :100]))
        b, last = lightning_attention(qkv[:, 100:], decay, state=middle, segments=jnp.asarray(segments[:, 100:]))
        valid = segments[0] > 0
        assert rms_error(jnp.concatenate([a, b], 1)[0, valid], whole[0, valid]) < 2e-6
        assert rms_error(last, end) < 2e-6


@pytest.mark.parametrize("form", ["reference", "direct", "blocked"])
def test_softmax_attention_of_packed_rows(form: str) -> None:
    H, K, D = 4, 2, 8
    arrays = normal(0, 2, WIDTH, H, D), normal(1, 2, K, WIDTH, D), normal(2, 2, K, WIDTH, D)
    segments, offset = jnp.asarray(segments_of(ROWS, WIDTH)), jnp.zeros(2, jnp.int32)
    weight = jnp.where(segments[..., None, None] > 0, normal(3, 2, WIDTH, H, D), 0)
    forms: dict[str, Any] = {
        "reference": lambda q, k, v: softmax_attention(q, k, v, segments=segments, implementation="reference"),
        "direct": lambda q, k, v: softmax_xla.direct(q, k, v, offset, segments),
        "blocked": lambda q, k, v: softmax_xla.blocked(q, k, v, offset, 32, 48, segments),
    }

    def separate(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for b, first, last in pieces(ROWS):
            row = slice(b, b + 1)
            out = softmax_attention(
                q[row, first:last], k[row, :, first:last], v[row, :, first:last], implementation="reference"
            )
            total += jnp.vdot(out, weight[b, first:last])
        return total

    value, got = jax.value_and_grad(lambda *a: jnp.vdot(forms[form](*a), weight), (0, 1, 2))(*arrays)
    want_value, want = jax.value_and_grad(separate, (0, 1, 2))(*arrays)
    assert value == pytest.approx(float(want_value), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert rms_error(a, b) < 1e-5


def test_softmax_attention_of_packed_rows_from_an_offset() -> None:
    """Queries in the middle of a row read their segment's keys before them."""
    q, k, v = normal(0, 2, 40, 4, 8), normal(1, 2, 2, WIDTH, 8), normal(2, 2, 2, WIDTH, 8)
    segments, offset = jnp.asarray(segments_of(ROWS, WIDTH)), jnp.asarray([110, 200])
    want = softmax_attention(q, k, v, offset=offset, segments=segments, implementation="reference")
    assert rms_error(softmax_xla.direct(q, k, v, offset, segments), want) < 2e-6
    assert rms_error(softmax_xla.blocked(q, k, v, offset, 16, 24, segments), want) < 2e-6


PACKED = [[9, 4, 6], [17]]


@pytest.mark.parametrize("config", [SMALL, variant(layer_types=("lightning", "lightning", "softmax"))])
def test_packed_rows_match_float64(config: Any) -> None:
    model = random_model(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 22)).astype(np.int32)
    logits = model(tokens, segments=segments_of(PACKED, 22))
    for b, first, last in pieces(PACKED):
        want, _ = numpy_m1.forward(config, flatten(model), tokens[b, first:last])
        assert rms_error(logits[b, first:last], want) < 3e-6


def test_bad_segments_are_named() -> None:
    model, tokens = random_model(variant(layer_types=("lightning",))), np.zeros((2, 4), np.int32)
    with pytest.raises(ValueError, match="segments: expected integers"):
        model(tokens, segments=np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="segments"):
        lightning_attention(jnp.zeros((1, 4, 2, 3, 8)), jnp.zeros(2), segments=jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="segments"):
        softmax_attention(
            jnp.zeros((1, 4, 2, 8)),
            jnp.zeros((1, 2, 4, 8)),
            jnp.zeros((1, 2, 4, 8)),
            segments=jnp.ones((1, 3), jnp.int32),
        )
