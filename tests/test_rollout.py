"""Rollouts on the device: the engine's replies, the policy's log-probabilities, and where they end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax import M1
from m1jax.engine import Engine
from m1jax.model import build
from m1jax.params import ParamSpec
from m1jax.reply import Request
from m1jax.rl.rollout import Rollout, padded_prompts, rollout, sampling_rows
from m1jax.sampling import Sampling
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.rules import shardings
from m1jax.tokenizer import Tokenizer
from m1jax.train.forward import hidden_states
from m1jax.train.loss import head_weight, token_log_probs
from m1jax.train.step import computing
from tests.generation_fixtures import tiny_config, train_tokenizer

WINDOW, REPLIES = 12, 2
PROMPTS = [(65, 66, 67), (80,) * 7, (1, 2, 3, 4, 5)]
SEEDS = [7, 8, 9]


@pytest.fixture(scope="module")
def model() -> M1:
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1], max_position_embeddings=256)
    rng = np.random.default_rng(0)

    def leaf(path: str, spec: ParamSpec) -> jax.Array:
        values = np.ones(spec.shape) if spec.init is None else rng.normal(scale=spec.init, size=spec.shape)
        return jnp.asarray(values.astype(spec.dtype or "float32"))

    return build(config, leaf)


def run(
    model: M1,
    temperature: float = 1.0,
    eos: tuple[int, ...] = (),
    loop_tokens: int = 3000,
    routes: bool = False,
    recurrent: bool = False,
) -> Rollout:
    prompts, lengths = padded_prompts(PROMPTS, 8)
    rows = sampling_rows(SEEDS, REPLIES, temperature)
    # One shape of `eos` for all tests, so that the loop is compiled once; -2 is no token.
    ids = np.asarray([*eos, *[-2] * (2 - len(eos))], np.int32)
    named: dict[str, Any] = {"replies": REPLIES, "window": WINDOW, "routes": routes, "recurrent": recurrent}
    return jax.device_get(rollout(model, prompts, lengths, rows, ids, loop_tokens, **named))


def test_replies_are_the_engines(model: M1, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    engine = Engine(model, Tokenizer.load(folder))
    engine.eos_ids = frozenset()
    requests = [
        Request(tokens, Sampling(top_p=1.0), seed, n=REPLIES, max_tokens=WINDOW)
        for tokens, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    found = {(e.request, e.reply.sample): e.reply.tokens for e in engine.generate(requests, 8) if e.reply.finish}
    out = run(model)
    assert [found[q, g] for q in range(3) for g in range(REPLIES)] == out.tokens.tolist()
    assert not out.ended.any() and not out.looped.any() and (out.lengths == WINDOW).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_of_the_whole_forward_pass(model: M1, temperature: float) -> None:
    out = run(model, temperature)
    for row, (tokens, logp) in enumerate(zip(out.tokens, out.logp, strict=True)):
        prompt = PROMPTS[row // REPLIES]
        logits = model(np.asarray([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1] / (temperature or 1.0)
        expected = jax.nn.log_softmax(logits)[np.arange(WINDOW), tokens]
        np.testing.assert_allclose(logp, expected, atol=2e-4)
        if temperature == 0:
            assert (np.argmax(logits, -1) == tokens).all()


def test_the_experts_of_a_rollout_are_those_of_the_whole_forward_pass(model: M1) -> None:
    out, plain = run(model, routes=True), run(model)
    assert (out.tokens == plain.tokens).all() and plain.routes is None
    assert out.prompt_routes is not None and out.routes is not None
    for row, tokens in enumerate(out.tokens):
        prompt = PROMPTS[row // REPLIES]
        logits = model.trace(np.asarray([[*prompt, *tokens]])).router_logits[:, 0]  # [L, T, E]
        best = np.argsort(-logits, axis=-1)[..., : model.config.num_experts_per_tok].swapaxes(0, 1)
        assert (out.prompt_routes[row // REPLIES, : len(prompt)] == best[: len(prompt)]).all()
        assert (out.routes[row] == best[len(prompt) :]).all()


@pytest.mark.parametrize(
    ("dtype", "recurrent", "least"),
    [("float32", False, 0.999999), ("bfloat16", False, 0.9999), ("bfloat16", True, 0.9999)],
)
def test_rollout_and_training_agree(model: M1, dtype: str, recurrent: bool, least: float) -> None:
    """Pearson's correlation over all tokens, of log-probabilities and of probabilities.

    Random weights are the worst case in bfloat16: all is uncertain, so that every rounding shows in the probabilities.
    """
    out = run(computing(model, dtype), routes=True, recurrent=recurrent)
    assert out.prompt_routes is not None and out.routes is not None
    tokens = np.stack(
        [
            np.r_[np.zeros(8 - len(PROMPTS[n // REPLIES]), int), PROMPTS[n // REPLIES], row]
            for n, row in enumerate(out.tokens)
        ]
    )
    segments = np.stack([np.arange(8 + WINDOW) >= 8 - len(PROMPTS[n // REPLIES]) for n in range(len(tokens))])
    routes = np.zeros((*tokens.shape, *out.routes.shape[2:]), np.uint8)
    for n, row in enumerate(out.routes):
        routes[n] = np.concatenate([np.roll(out.prompt_routes[n // REPLIES], 8 - len(PROMPTS[n // REPLIES]), 0), row])
    packed = segments.astype(int)
    hidden, _ = hidden_states(computing(model, dtype), tokens, packed, "none", routes=routes, recurrent=recurrent)
    logp, _ = token_log_probs(hidden[:, 7:-1], head_weight(model), jnp.asarray(out.tokens))
    assert np.corrcoef(np.ravel(logp), np.ravel(out.logp))[0, 1] > least
    assert np.corrcoef(np.exp(np.ravel(logp)), np.exp(np.ravel(out.logp)))[0, 1] > least


def test_replies_end_at_the_end_of_a_sentence(model: M1) -> None:
    free = run(model)
    eos = int(free.tokens[0, 4]), int(free.tokens[3, 6])
    out = run(model, eos=eos)
    for row, tokens in enumerate(free.tokens):
        hits = np.flatnonzero(np.isin(tokens, eos))
        length = hits[0] + 1 if len(hits) else WINDOW
        assert out.lengths[row] == length and out.ended[row] == bool(len(hits))
        assert (out.tokens[row, :length] == tokens[:length]).all() and not out.tokens[row, length:].any()
        np.testing.assert_allclose(out.logp[row, :length], free.logp[row, :length], atol=1e-4)
        assert not out.logp[row, length:].any()
    assert out.ended.any() and not out.ended.all()


def test_repetition_loops_are_stopped(model: M1) -> None:
    """A temperature near zero makes every token certain: after five of them in a row it counts as a loop."""
    out = run(model, temperature=1e-4, loop_tokens=5)
    assert out.looped.any() and not out.ended.any()
    for row in range(len(out.tokens)):
        sure = out.logp[row, : out.lengths[row]] > np.log(0.99)
        runs = [bool(sure[n - 5 : n].all()) for n in range(5, len(sure) + 1)]
        assert out.looped[row] == any(runs) and sum(runs) <= 1, "stopped at the first run of five, not later"
    assert not run(model, temperature=1.0, loop_tokens=5).looped.any()


def test_a_cache_that_is_split_need_not_divide_prompt_and_window(model: M1) -> None:
    prompts, lengths = padded_prompts(PROMPTS, 8)
    rows = sampling_rows(SEEDS, REPLIES, 1.0)
    mesh = make_mesh(MeshShape.parse("seq=4"), "serve", jax.devices()[:4])
    run = functools.partial(rollout, replies=REPLIES, window=WINDOW - 1)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, shardings(model.config, mesh, model))
        out = jax.eval_shape(run, sharded, prompts, lengths, rows, np.zeros((1,), np.int32), 3000)
    assert out.tokens.shape == (len(PROMPTS) * REPLIES, WINDOW - 1)


def test_prompts_are_padded_to_few_shapes() -> None:
    tokens, lengths = padded_prompts([(1, 2), (3,) * 33], 32)
    assert tokens.shape == (2, 64) and lengths.tolist() == [2, 33]
    assert tokens[0, :3].tolist() == [1, 2, 0] and tokens[1, 32] == 3
