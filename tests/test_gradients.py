"""Packed rows against separate ones, and gradients against references: ops, model, and transformers' own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.kernels.experts import gradient as experts_gradient
from m1jax.kernels.experts import reference as experts_reference
from m1jax.kernels.lightning_attention import lightning_attention, log_decay
from m1jax.kernels.softmax_attention import api as softmax_api
from m1jax.kernels.softmax_attention import softmax_attention
from m1jax.kernels.softmax_attention import xla as softmax_xla
from m1jax.model import head
from m1jax.params import flatten
from m1jax.train import loss
from m1jax.train.forward import hidden_states
from m1jax.train.loss import CHUNK, Balance, token_log_probs
from m1jax.train.step import accumulated, cross_entropy
from tests import numpy_m1
from tests.test_kernels import gradients, routing
from tests.tools import SMALL, normal, random_model, rms_error, variant

# Lengths of the sequences in each row of 200; the rest of a row is padding, 0 is padding between two sequences.
ROWS = [[130, 1, 69], [5, 150]]
WIDTH = 200


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

    (value, (out, _)), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(qkv)
    (want, outs), want_gradient = jax.jit(jax.value_and_grad(separate, has_aux=True))(qkv)
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
    valid = segments[0] > 0

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(qkv: jax.Array, state: jax.Array, segments: Any, implementation: Any = None) -> Any:
        return lightning_attention(qkv, decay, state=state, segments=segments, implementation=implementation)

    a, middle = run(qkv[:, :100], state, segments[:, :100])
    b, last = run(qkv[:, 100:], middle, segments[:, 100:])
    for implementation in ("reference", "xla"):
        whole, end = run(qkv, state, segments, implementation)
        assert rms_error(np.concatenate([a, b], 1)[0, valid], whole[0, valid]) < 2e-6
        assert rms_error(last, end) < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton_interpreted"])
def test_a_segment_past_the_length_leaves_the_state_alone(implementation: Any) -> None:
    """Whole, or cut off where it ends: the same state, and the same gradient of it."""
    qkv, decay, into = normal(0, 2, 40, 2, 3, 32), jnp.asarray([-0.1, -0.01]), normal(1, 2, 2, 32, 32)
    segments = jnp.asarray([[1] * 20 + [2] * 20, [1] * 5 + [2] * 20 + [3] * 15])

    def gradient(T: int) -> Any:
        named: dict[str, Any] = {"segments": segments[:, :T], "lengths": jnp.asarray([20, 18])}

        def fn(qkv: jax.Array) -> jax.Array:
            return jnp.vdot(lightning_attention(qkv, decay, implementation=implementation, **named)[1], into)

        return jax.jit(jax.value_and_grad(fn))(qkv[:, :T])

    (value, whole), (want, cut) = gradient(40), gradient(20)
    assert value == pytest.approx(float(want), rel=1e-5) and abs(value) > 1
    assert rms_error(whole[:, :20], cut) < 1e-5 and not np.any(whole[:, 20:])


@pytest.mark.parametrize("form", ["reference", "direct", "direct in blocks", "blocked"])
def test_softmax_attention_of_packed_rows(form: str) -> None:
    H, K, D = 4, 2, 8
    arrays = normal(0, 2, WIDTH, H, D), normal(1, 2, K, WIDTH, D), normal(2, 2, K, WIDTH, D)
    segments, offset = jnp.asarray(segments_of(ROWS, WIDTH)), jnp.zeros(2, jnp.int32)
    weight = jnp.where(segments[..., None, None] > 0, normal(3, 2, WIDTH, H, D), 0)
    forms: dict[str, Any] = {
        "reference": lambda q, k, v: softmax_attention(q, k, v, segments=segments, implementation="reference"),
        "direct": lambda q, k, v: softmax_xla.direct(q, k, v, offset, segments),
        "direct in blocks": lambda q, k, v: softmax_xla.direct_in_blocks(q, k, v, offset, 24, segments),
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

    value, got = jax.jit(jax.value_and_grad(lambda *a: jnp.vdot(forms[form](*a), weight), (0, 1, 2)))(*arrays)
    want_value, want = jax.jit(jax.value_and_grad(separate, (0, 1, 2)))(*arrays)
    assert value == pytest.approx(float(want_value), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert rms_error(a, b) < 1e-5


def test_softmax_attention_of_packed_rows_from_an_offset() -> None:
    """Queries in the middle of a row read their segment's keys before them."""
    q, k, v = normal(0, 2, 40, 4, 8), normal(1, 2, 2, WIDTH, 8), normal(2, 2, 2, WIDTH, 8)
    segments, offset = jnp.asarray(segments_of(ROWS, WIDTH)), jnp.asarray([110, 150])
    forms: list[Any] = [
        functools.partial(softmax_attention, implementation="reference"),
        softmax_xla.direct,
        functools.partial(softmax_xla.blocked, q_block=16, k_block=24),
    ]
    want, *found = (jax.jit(form)(q, k, v, offset=offset, segments=segments) for form in forms)
    for got in found:
        assert rms_error(got, want) < 2e-6


AGAIN = np.asarray([[1] * 30 + [2] * 90 + [1] * 40, [4] * 50 + [0] * 20 + [4] * 90], np.int32)  # ids that come again
ANEW = np.asarray([[1] * 30 + [2] * 90 + [3] * 40, [4] * 50 + [0] * 20 + [5] * 90], np.int32)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton_interpreted"])
def test_an_id_that_comes_again_is_another_segment(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both attentions, whole and in blocks."""
    qkv, decay, valid = normal(0, 2, 160, 2, 3, 32), jnp.asarray([-0.1, -0.01]), AGAIN > 0
    got = lightning_attention(qkv, decay, segments=jnp.asarray(AGAIN), implementation=implementation)[0]
    want = lightning_attention(qkv, decay, segments=jnp.asarray(ANEW), implementation="reference")[0]
    assert rms_error(got[valid], want[valid]) < 2e-6
    if implementation == "triton_interpreted":
        return
    q, k, v = normal(0, 2, 160, 4, 8), normal(1, 2, 2, 160, 8), normal(2, 2, 2, 160, 8)
    want = softmax_attention(q, k, v, segments=jnp.asarray(ANEW), implementation="reference")
    for blocks in ({}, {"DIRECT": 0, "Q_BLOCK": 16, "K_BLOCK": 24}):
        for name, size in blocks.items():
            monkeypatch.setattr(softmax_api, name, size)
        got = softmax_attention(q, k, v, segments=jnp.asarray(AGAIN), implementation=implementation)
        assert rms_error(got[valid], want[valid]) < 2e-6


PACKED = [[9, 4, 6], [17]]


@pytest.mark.parametrize("config", [SMALL, variant(layer_types=("lightning", "lightning", "softmax"))])
def test_packed_rows_match_float64(config: Any) -> None:
    model = random_model(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 22)).astype(np.int32)
    logits = model(tokens, segments=segments_of(PACKED, 22))
    ids = np.where(segments_of(PACKED, 22) == 3, 1, segments_of(PACKED, 22))
    again = model(tokens, segments=ids)  # where an id comes again, another segment begins
    for b, first, last in pieces(PACKED):
        want, _ = numpy_m1.forward(config, flatten(model), tokens[b, first:last])
        assert rms_error(logits[b, first:last], want) < 3e-6
        assert rms_error(again[b, first:last], want) < 3e-6


def biggest(fn: Any, *args: Any) -> int:
    """Elements of the largest array that a function makes, in loops and branches too."""

    def of(jaxpr: Any) -> int:
        sizes = [0]
        for eqn in jaxpr.eqns:
            sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    sizes.append(of(inner))
        return max(sizes)

    return of(jax.make_jaxpr(fn)(*args).jaxpr)


def test_gradients_keep_no_scores_and_no_states() -> None:
    """What autodiff would store: T × T scores of softmax attention, a D × D state for each chunk of lightning's."""
    T, H, D = 4096, 1, 32  # a chunk of D tokens would look like a state
    q, k = jnp.zeros((1, T, H, D)), jnp.zeros((1, H, T, D))
    softmax = jax.grad(lambda q, k: jnp.sum(softmax_attention(q, k, k)), (0, 1))
    assert biggest(softmax, q, k) <= max(T * H * D, 256 * 256)
    qkv, decay = jnp.zeros((1, T, H, 3, D)), jnp.zeros(H)
    lightning = jax.grad(lambda x: jnp.sum(lightning_attention(x, decay)[0]))
    assert biggest(lightning, qkv) <= qkv.size
    wide = jax.make_jaxpr(lightning)(qkv).jaxpr
    assert not any(v.aval.shape[-2:] == (D, D) and v.aval.size > D * D for e in wide.eqns for v in e.outvars)


def test_a_loop_over_layers_keeps_no_masks() -> None:
    """Those of all blocks hang on no layer: JAX would compute them ahead of the loop, T × T for each group of heads."""
    T, D = 4096, 4
    q, k, segments = jnp.zeros((1, T, 2, D)), jnp.zeros((1, 1, T, D)), jnp.ones((1, T), jnp.int32)

    def layers(q: jax.Array, k: jax.Array) -> jax.Array:
        def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            return softmax_attention(q, k, k, segments=segments), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), q, None, length=3)[0])

    # Three layers' inputs, or one block of scores.
    assert biggest(jax.grad(layers, (0, 1)), q, k) <= max(3 * q.size, 2 * 256 * 256)


def test_cross_entropy_never_holds_all_logits() -> None:
    B, T, M, V = 2, 3000, 8, 50_000
    hidden, head = normal(0, B, T, M), normal(1, V, M)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
    gradient = jax.grad(lambda h, w: jnp.sum(token_log_probs(h, w, targets)[0]), (0, 1))
    assert biggest(gradient, hidden, head) <= CHUNK < B * T * V


def test_log_probabilities_near_zero_are_not_rounded_as_the_logits_are() -> None:
    logits = np.linspace(200, 229, 50, dtype=np.float32)
    logits[7] = 240  # next to which float32 numbers are 1.5e-5 apart
    log_p, _ = token_log_probs(jnp.ones((1, 1, 1)), jnp.asarray(logits)[:, None], jnp.asarray([[7]]))
    want = -np.log1p(np.sum(np.exp(np.delete(logits, 7).astype(np.float64) - 240)))
    assert abs(float(log_p[0, 0]) - want) < 3e-7


def test_cross_entropy_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16 * 40)
    hidden, head = normal(0, 2, 21, 8), normal(1, 40, 8)
    targets, weight = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 21))), normal(2, 2, 21)

    def whole(h: jax.Array, w: jax.Array) -> Any:
        log_p = jax.nn.log_softmax(jnp.einsum("btm,vm->btv", h, w, precision="highest") / 0.7)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return jnp.vdot(jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0], weight), entropy

    def pieces(h: jax.Array, w: jax.Array) -> Any:
        log_p, entropy = token_log_probs(h, w, targets, 0.7)
        return jnp.vdot(log_p, weight) + jnp.sum(entropy), entropy

    (value, entropy), got = jax.jit(jax.value_and_grad(pieces, (0, 1), has_aux=True))(hidden, head)
    (want, want_entropy), gradient = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(hidden, head)
    assert float(value - jnp.sum(entropy)) == pytest.approx(float(want), rel=1e-4)
    assert rms_error(entropy, want_entropy) < 2e-6
    for a, b in zip(got, gradient, strict=True):
        assert rms_error(a, b) < 1e-5


def packed_batch(rows: list[list[int]], width: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same sequences packed, with empty rows, and in a row each: of one shape."""
    rng = np.random.default_rng(seed)
    segments = np.pad(segments_of(rows, width), ((0, len(pieces(rows)) - len(rows)), (0, 0)))
    packed = {
        name: rng.integers(0, SMALL.vocab_size, segments.shape).astype(np.int32) for name in ("tokens", "targets")
    }
    packed |= {"segments": segments, "weights": rng.random(segments.shape, np.float32) * (segments > 0)}
    alone = {name: np.zeros((len(pieces(rows)), width), x.dtype) for name, x in packed.items()}
    for row, (b, first, last) in enumerate(pieces(rows)):
        for name, x in packed.items():
            alone[name][row, : last - first] = x[b, first:last] if name != "segments" else 1
    return packed, alone


@pytest.mark.parametrize(
    ("remat", "kinds"),
    [("layer", ("lightning", "lightning", "softmax") * 2), ("none", ("softmax",)), ("projections", ("lightning",) * 2)],
)
def test_packing_gives_the_loss_and_gradients_of_separate_rows(remat: Any, kinds: tuple[str, ...]) -> None:
    model = random_model(variant(layer_types=kinds, shared_intermediate_size=20))
    fn = jax.jit(functools.partial(accumulated, cross_entropy("float32", remat, Balance(0.5))))
    packed, alone = packed_batch(PACKED, 22, 0)
    gradient, metrics = fn(model, {name: x[None] for name, x in packed.items()})
    want_gradient, want = fn(model, {name: x[None] for name, x in alone.items()})
    assert metrics.pop("dropped") == 0
    for name in metrics:
        assert rms_error(metrics[name], want[name]) < 3e-6, name
    for path, leaf in flatten(gradient).items():
        assert not leaf.size or rms_error(leaf, flatten(want_gradient)[path]) < 1e-5, path


def test_the_training_form_is_the_model() -> None:
    """Hidden states and gradients as by the plain forward pass; routers' sums as by its router logits."""
    config = variant(layer_types=("softmax", "lightning"), tie_word_embeddings=True)
    model, (packed, _) = random_model(config), packed_batch(PACKED, 22, 1)
    tokens, segments, k = packed["tokens"], packed["segments"], config.num_experts_per_tok
    hidden, routing = jax.jit(functools.partial(hidden_states, remat="none"))(model, tokens, segments)
    trace, valid = model.trace(tokens, segments), segments > 0
    assert rms_error(hidden[valid], trace.final[valid]) < 1e-6
    p = np.asarray(jax.nn.softmax(trace.router_logits))[:, valid]  # [L, N, E]
    assert rms_error(routing.probability, p.sum(1)) < 1e-6
    assert rms_error(routing.entropy, -(p * np.log(p)).sum((1, 2))) < 1e-6
    best = np.argsort(-p, axis=-1)[..., :k]
    want = np.stack([[np.bincount(layer[:, j], minlength=p.shape[2]) for j in range(k)] for layer in best])
    assert np.array_equal(routing.chosen, want)
    assert list(routing.tokens) == [valid.sum()] * 2

    weight = normal(3, *tokens.shape, config.vocab_size) * valid[..., None]
    got = jax.jit(jax.grad(lambda m: jnp.vdot(head(m, hidden_states(m, tokens, segments)[0]), weight)))(model)
    plain = jax.jit(jax.grad(lambda m: jnp.vdot(m(tokens, segments), weight)))(model)
    for path, leaf in flatten(got).items():
        assert rms_error(leaf, flatten(plain)[path]) < 1e-5, path


@pytest.mark.parametrize("rows", [4, 64])
def test_experts_gradients_in_bfloat16_and_without_padding(rows: int) -> None:
    """Also with experts that nobody chose, tokens that chose nobody, and a layer in the middle of a stack."""
    N, E, F, M = 70, 6, 16, 12
    x, w13, w2 = normal(0, N, M), normal(1, 3, E, 2, F, M) / 4, normal(2, 3, E, M, F) / 4
    chosen, weights = routing(3, N, 2, 4, skew=True)
    chosen = chosen.at[::5].set(E)

    def run(form: Any, dtype: str) -> list[jax.Array]:
        return gradients(
            lambda x, u, d, w: form(*(a.astype(dtype) for a in (x, u, d)), 1, chosen, w), x, w13, w2, weights
        )

    want = run(experts_reference.experts, "float32")
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 2e-2)):
        got = run(lambda *args: experts_gradient.blocked(*args, rows), dtype)
        for a, b in zip(got, want, strict=True):
            assert rms_error(a, b) < limit


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
