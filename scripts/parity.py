"""python scripts/parity.py

Relative RMS error against the official PyTorch code's outputs for the random checkpoint in tests/data/m1_tiny (two
prompts of 300 tokens, greedy decode of 25), as the README's table.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file

import m1jax

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "m1_tiny"


def rms(ours: ArrayLike, theirs: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `theirs`."""
    return float(
        np.sqrt(np.mean((np.asarray(ours, np.float64) - theirs) ** 2) / np.mean(theirs.astype(np.float64) ** 2))
    )


def in_chunks(model: m1jax.M1, ids: np.ndarray, size: int) -> tuple[np.ndarray, m1jax.M1State]:
    """Logits and final state of the prompt read `size` tokens at a time."""
    state, out = model.init_state(len(ids), ids.shape[1]), []
    for at in range(0, ids.shape[1], size):
        logits, state = model.step(ids[:, at : at + size], state)
        out.append(np.asarray(logits))
    return np.concatenate(out, 1), state


def measure(dtype: str) -> dict[str, str]:
    """One column of the table."""
    want, model = load_file(FOLDER / "expected.safetensors"), m1jax.load(FOLDER, dtype=dtype)
    agree = 0.0
    ids, trace = want["input_ids"], model.trace(want["input_ids"])
    out = {
        "router logits, layer 0": rms(trace.router_logits[0].reshape(-1, 4), want["router_logits_layer0"]),
        "output of layer 0": rms(trace.hidden[0], want["hidden_layer0_out"]),
        "last hidden state": rms(trace.final, want["hidden_last_normed"]),
    }
    for name, size in {"whole": 300, "chunks of 128": 128, "chunks of 7": 7, "token by token": 1}.items():
        logits, state = in_chunks(model, ids, size)
        out[f"logits, {name}"] = rms(logits, want["logits"])
        out[f"last lightning state, {name}"] = rms(state.lightning.s[-1], want["lightning_state_last"])
        agree = float(np.mean(np.argmax(logits, -1) == np.argmax(want["logits"], -1)))
    return {k: f"{v:.1e}" for k, v in out.items()} | {
        "same argmax": f"{agree:.1%}",
        "greedy tokens equal": decode(model, want),
    }


def decode(model: m1jax.M1, want: dict[str, np.ndarray]) -> str:
    """How many of the greedily decoded tokens agree, up to each row's first difference."""
    tokens = want["decode_tokens"]
    logits, state = model.step(want["input_ids"], model.init_state(2, 400), logits="last")
    got = [np.argmax(logits, -1)]
    for _ in range(tokens.shape[1] - 1):
        logits, state = model.step(got[-1][:, None], state, logits="last")
        got.append(np.argmax(logits, -1))
    same = np.cumprod(np.stack(got, 1) == tokens, axis=1)
    return f"{int(same.sum())} of {tokens.size}"


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
    print("| | float32 | bfloat16 |\n|---|---|---|")
    for what, value in columns["float32"].items():
        print(f"| {what} | {value} | {columns['bfloat16'][what]} |")


if __name__ == "__main__":
    main()
