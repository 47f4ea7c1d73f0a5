"""The official PyTorch code's own outputs for a random checkpoint in the official layout, reproduced.

Prompts of 300 tokens, two rows: logits, hidden states, router logits, lightning states, greedy decode.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import m1jax
from tests.tools import TINY, rms_error

LIMIT = 3e-6
EXPECTED = load_file(TINY / "expected.safetensors")
IDS = EXPECTED["input_ids"]


@pytest.fixture(scope="module")
def model() -> m1jax.M1:
    return m1jax.load(TINY, dtype="float32")


def test_whole(model: m1jax.M1) -> None:
    logits = model(IDS)
    assert rms_error(logits, EXPECTED["logits"]) < LIMIT
    assert np.array_equal(np.argmax(logits, -1), np.argmax(EXPECTED["logits"], -1))


def test_hidden_states_and_router(model: m1jax.M1) -> None:
    trace = model.trace(IDS)
    assert rms_error(trace.hidden[0], EXPECTED["hidden_layer0_out"]) < LIMIT
    assert rms_error(trace.final, EXPECTED["hidden_last_normed"]) < LIMIT
    assert rms_error(trace.router_logits[0].reshape(600, -1), EXPECTED["router_logits_layer0"]) < LIMIT


@pytest.mark.parametrize("size", [300, 128, 37, 1])
def test_in_chunks_of_any_size(model: m1jax.M1, size: int) -> None:
    state, out = model.init_state(2, 300), []
    for at in range(0, 300, size):
        chunk = IDS[:, at : at + size]
        lengths = np.full(2, chunk.shape[1])
        padded = np.pad(chunk, ((0, 0), (0, size - chunk.shape[1])))  # the last chunk: one compiled shape for all
        logits, state = model.step(padded, state, lengths=lengths)
        out.append(np.asarray(logits)[:, : chunk.shape[1]])
    logits = np.concatenate(out, 1)
    assert rms_error(logits, EXPECTED["logits"]) < LIMIT
    assert np.array_equal(np.argmax(logits, -1), np.argmax(EXPECTED["logits"], -1))
    assert rms_error(state.lightning.s[0], EXPECTED["lightning_state_first"]) < LIMIT
    assert rms_error(state.lightning.s[-1], EXPECTED["lightning_state_last"]) < LIMIT


def test_greedy_decode(model: m1jax.M1) -> None:
    want = EXPECTED["decode_tokens"]
    logits, state = model.step(IDS, model.init_state(2, 400), logits="last")
    tokens, out = [np.argmax(logits, -1)], []
    for _ in range(want.shape[1] - 1):
        logits, state = model.step(jnp.asarray(tokens[-1])[:, None], state, logits="last")
        out.append(np.asarray(logits))
        tokens.append(np.argmax(logits, -1))
    assert np.array_equal(np.stack(tokens, 1), want)
    assert rms_error(np.stack(out, 1), EXPECTED["decode_logits"]) < LIMIT


def test_bfloat16_error_is_what_the_readme_says() -> None:
    logits = m1jax.load(TINY, dtype="bfloat16")(IDS)
    error = rms_error(logits, EXPECTED["logits"])
    agree = np.mean(np.argmax(logits, -1) == np.argmax(EXPECTED["logits"], -1))
    print(f"bfloat16: relative RMS {error:.1e}, argmax equal {agree:.1%}")
    assert error < 2.5e-2 and agree > 0.95
