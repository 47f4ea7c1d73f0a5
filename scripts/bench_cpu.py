"""python scripts/bench_cpu.py [--dtypes float32 bfloat16] [--prefill 2048 8192] [--batches 1 8] [--out FILE.json]

Tokens per second of m1jax and of transformers' `MiniMaxForCausalLM` in one run: same weights, same machine, in turns.
The model has 950M parameters (hidden 1024, 16 layers 7:1, 16 heads × 64, 4 KV heads, 16 experts top-2 of width 1024,
vocabulary 32000). Prefill fills the state from an empty one and gives the last token's logits (`logits_to_keep=1`);
decode continues 64 tokens by 16, greedily. Compilation is not counted. The last column is the share of what the machine
can do that m1jax reaches, both limits measured in the same run: of the FLOP/s of a large matrix product in prefill, of
the bytes of memory read per second in decode. Needs the extra `parity`.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from machine import processor

import m1jax
from m1jax.params import flatten, param_table

SIDE = 2048  # of the matrix whose product shows the machine's FLOP/s
READ = 1 << 30  # bytes whose sum shows how fast memory is read
SPARED = 2**20 * (2 + 2 * 3)  # q, o and two experts of the last layer, which only the last token needs
FLOP_PER_TOKEN = 2 * (2**20 * (14 * 5 + 2 * 2.5 + 16 * 2 * 3) - SPARED)  # without attention and head
PROMPT, STEPS = 64, 16


def make_weights(folder: Path) -> None:
    """Writes the random model as transformers saves it; m1jax reads the same files."""
    torch.manual_seed(0)
    kinds = (["linear_attention"] * 7 + ["full_attention"]) * 2
    config = transformers.MiniMaxConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=16, layer_types=kinds,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_local_experts=16, num_experts_per_tok=2,
        linear_attn_alpha_factor=3.5, full_attn_alpha_factor=3.5, mlp_alpha_factor=3.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    )  # fmt: skip
    transformers.MiniMaxForCausalLM(config).save_pretrained(folder)
    os.sync()  # else it is written while the first row is measured


class Ours:
    """m1jax, through its public API."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = m1jax.load(folder, dtype=dtype)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last token; keeps the state."""
        state = self.model.init_state(ids.shape[0], ids.shape[1] + STEPS + 8)
        logits, self.state = self.model.step(jnp.asarray(ids), state, logits="last")
        return np.asarray(logits)

    def step(self, token: np.ndarray, position: int) -> np.ndarray:
        """One decode step; logits [B, V]."""
        logits, self.state = self.model.step(jnp.asarray(token), self.state, logits="last")
        return np.asarray(logits)


class Theirs:
    """transformers on PyTorch."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = transformers.MiniMaxForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def _run(self, ids: np.ndarray, **options: Any) -> np.ndarray:
        with torch.inference_mode():
            out = self.model(torch.tensor(ids), use_cache=True, logits_to_keep=1, **options)
        self.cache = out.cache
        return out.logits[:, -1].float().numpy()

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """As in `Ours`."""
        return self._run(ids)

    def step(self, token: np.ndarray, position: int) -> np.ndarray:
        """As in `Ours`."""
        where = torch.full(token.shape, position)
        return self._run(token, cache=self.cache, position_ids=where)


def limits(dtype: str) -> dict[str, float]:
    """The machine's FLOP/s in products of `dtype`, the better of torch's and XLA's, and bytes per second of reading."""
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    ours, theirs = jnp.asarray(matrix, dtype), torch.tensor(matrix, dtype=getattr(torch, dtype))
    times = jax.jit(lambda a: a @ a)
    fastest = min(best(lambda: times(ours).block_until_ready()), best(lambda: theirs @ theirs))
    data = torch.ones(READ // 4)
    return {"flops": 2 * SIDE**3 / fastest, "bytes": READ / best(data.sum)}


def best(fn: Callable[[], Any]) -> float:
    """Least seconds of several calls."""
    return min(seconds(fn) for _ in range(6))


def bytes_per_step(model: m1jax.M1, batch: int) -> float:
    """Bytes of weights that a decode step must read, if the rows choose their experts independently."""
    E, k, total = model.config.num_local_experts, model.config.num_experts_per_tok, 0.0
    chosen = 1 - (1 - k / E) ** batch  # share of the experts
    specs = param_table(model.config)
    for path, x in flatten(model).items():
        total += x.nbytes * (0.0 if path == "embed" else chosen if "experts" in specs[path].axes else 1.0)
    return total


def seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    fn(*args)
    return time.perf_counter() - start


def decode(engine: Any, ids: np.ndarray) -> float:
    """Median seconds of a greedy step after the prompt."""
    token, times = np.argmax(engine.prefill(ids), -1)[:, None], []
    for i in range(STEPS):
        start = time.perf_counter()
        logits = engine.step(token, ids.shape[1] + i)
        times.append(time.perf_counter() - start)
        token = np.argmax(logits, -1)[:, None]
    return statistics.median(times[2:])


def measure(folder: Path, dtype: str, lengths: list[int], batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for one dtype; the two engines take turns, the median of `repeats` counts."""
    ours = Ours(folder, dtype)
    engines = {"m1jax": ours, "transformers": Theirs(folder, dtype)}
    rng, rows, limit = np.random.default_rng(0), [], limits(dtype)
    for T in lengths:
        ids = rng.integers(0, 32000, (1, T))
        times: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            engine.prefill(ids)  # compile, warm up
        for _ in range(repeats):
            for name, engine in engines.items():
                times[name].append(seconds(engine.prefill, ids))
        rate = {name: T / statistics.median(t) for name, t in times.items()}
        rows.append(row(dtype, f"prefill {T}", rate, rate["m1jax"] * FLOP_PER_TOKEN / limit["flops"]))
    for B in batches:
        ids = rng.integers(0, 32000, (B, PROMPT))
        runs: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(repeats):
            for name, engine in engines.items():
                runs[name].append(decode(engine, ids))
        rate = {name: B / statistics.median(t) for name, t in runs.items()}
        read = bytes_per_step(ours.model, B) * rate["m1jax"] / B
        rows.append(row(dtype, f"decode B={B}", rate, read / limit["bytes"]))
    return rows


def row(dtype: str, what: str, rate: dict[str, float], share: float) -> dict[str, Any]:
    """One line of the table, printed at once."""
    ratio = rate["m1jax"] / rate["transformers"]
    cells = (dtype, what, f"{rate['transformers']:.1f}", f"{rate['m1jax']:.1f}", f"{ratio:.2f}×", f"{share:.0%}")
    print(f"| {' | '.join(cells)} |", flush=True)
    return {"dtype": dtype, "what": what, **rate, "ratio": ratio, "share": share}


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048, 8192], help="prompt lengths")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes of the decode rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers)}
    print(f"{processor()}; {versions}\n")
    print("| dtype | | transformers, tokens/s | m1jax, tokens/s | ratio | of the machine |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder))
        rows = [r for d in args.dtypes for r in measure(Path(folder), d, args.prefill, args.batches, args.repeats)]
    if args.out:
        report = {"date": str(datetime.date.today()), "machine": processor(), "versions": versions, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
