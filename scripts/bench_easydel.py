"""python scripts/bench_easydel.py --easydel PYTHON [--dtypes float32] [--prefill 1024] [--out FILE.json]

m1jax beside EasyDeL, the other library in which M1's layers exist in JAX: how far each is from the official code's
outputs (the random checkpoint in tests/data/m1_tiny), tokens per second with the same weights, in turns, each in a
process of its own, and what compiling a program for the first time takes.

PYTHON is the interpreter of an environment in which EasyDeL is installed (`pip install easydel pillow torch`), for it
pins older versions of what m1jax needs. EasyDeL does not know `minimax_m1`: `translated` writes for it the config.json
that transformers' class would have. All its dtypes are set, everything is jitted, its own functions prepare caches, and
a decode step takes the form of its experts that is fastest there.

The model is that of bench_cpu.py: 950M parameters, hidden 1024, 16 layers 7:1, 16 experts top-2. Prefill gives the last
token's logits, decode continues 64 tokens by 16, greedily; a gradient is that of the mean cross-entropy of one row, of
all weights.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from machine import processor

TINY = Path(__file__).parents[1] / "tests" / "data" / "m1_tiny"
FIELDS = {
    "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "rotary_dim": 32, "num_local_experts": 16, "rope_theta": 10_000_000,
    **{f"layernorm_{part}_alpha": 3.5 for part in ("linear_attention", "full_attention", "mlp")},
}  # fmt: skip
PROMPT, STEPS, ROW = 64, 16, 128


class Engine(Protocol):
    """What both do. Results are NumPy arrays, so that a call ends when the device is done."""

    versions: dict[str, str]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of all tokens, float32 [B, T, V]."""
        ...

    def prefill(self, ids: np.ndarray, room: int) -> np.ndarray:
        """Logits [B, V] of the last token; keeps a state with room for so many tokens."""
        ...

    def step(self, token: np.ndarray) -> np.ndarray:
        """One decode step of [B, 1]; logits [B, V]."""
        ...

    def gradient(self, ids: np.ndarray) -> float:
        """Computes the gradient of the mean cross-entropy of [B, T]; its loss."""
        ...


class M1Jax:
    """m1jax, through its public API."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import jax

        import m1jax

        self.model = m1jax.load(folder, dtype=dtype)
        self.versions = {"jax": jax.__version__}
        self._logits = jax.jit(lambda model, ids: model(ids))
        self._gradient = jax.jit(jax.value_and_grad(lambda model, ids: cross_entropy(model(ids), ids)))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        return np.asarray(self._logits(self.model, ids), np.float32)

    def prefill(self, ids: np.ndarray, room: int) -> np.ndarray:
        """As in `Engine`."""
        logits, self.state = self.model.step(ids, self.model.init_state(len(ids), room), logits="last")
        return np.asarray(logits)

    def step(self, token: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        logits, self.state = self.model.step(token, self.state, logits="last")
        return np.asarray(logits)

    def gradient(self, ids: np.ndarray) -> float:
        """As in `Engine`."""
        import jax

        return float(jax.block_until_ready(self._gradient(self.model, ids))[0])


class EasyDeL:
    """EasyDeL's model, by its own functions of generation; the head sees the last token only."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import easydel  # pyright: ignore[reportMissingImports]
        import flax
        import jax
        import jax.numpy as jnp
        from flax import nnx

        kind = getattr(jnp, dtype)
        self.model = model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
            str(folder), dtype=kind, param_dtype=kind, from_torch=True, verbose=False,
            precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
            config_kwargs={"attn_dtype": kind, "kvdtype": kind, "attn_softmax_dtype": jnp.float32},
        )  # fmt: skip
        self.versions = {"easydel": easydel.__version__, "jax": jax.__version__, "flax": flax.__version__}
        whole, self.weights, self.rest = nnx.split(model, nnx.Param, ...)
        for layer in model.model.layers:  # several times as fast for single tokens; for many it needs too much memory
            layer.block_sparse_moe.module_moe_method = "dense_moe"
        single, *_ = nnx.split(model, nnx.Param, ...)

        def last(model: Any, tokens: Any, inputs: Any) -> Any:
            out = model._call_generation_model_step(model, tokens, dict(inputs) | {"apply_lm_head": False})
            inputs = model.update_inputs_for_generation(out, inputs)
            return model.apply_lm_head(out.last_hidden_state[:, -1:])[:, 0], inputs

        def prefill(weights: Any, rest: Any, ids: Any, room: int) -> Any:
            model = nnx.merge(whole, weights, rest)
            return last(model, ids, model.prepare_inputs_for_generation(ids, max_length=room, pad_token_id=-1))

        def step(weights: Any, rest: Any, token: Any, inputs: Any) -> Any:
            return last(nnx.merge(single, weights, rest), token, inputs)

        def logits(weights: Any, rest: Any, ids: Any) -> Any:
            return nnx.merge(whole, weights, rest)(input_ids=ids).logits

        self._logits = jax.jit(logits)
        self._prefill = jax.jit(prefill, static_argnums=3)
        self._step = jax.jit(step, donate_argnums=3)
        self._gradient = jax.jit(jax.value_and_grad(lambda w, rest, ids: cross_entropy(logits(w, rest, ids), ids)))

    def _run(self, fn: Any, *args: Any) -> Any:
        import jax

        with self.model.mesh:
            return jax.block_until_ready(fn(self.weights, self.rest, *args))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        return np.asarray(self._run(self._logits, ids), np.float32)

    def prefill(self, ids: np.ndarray, room: int) -> np.ndarray:
        """As in `Engine`."""
        logits, self.inputs = self._run(self._prefill, ids, room)
        return np.asarray(logits, np.float32)

    def step(self, token: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        logits, self.inputs = self._run(self._step, token, self.inputs)
        return np.asarray(logits, np.float32)

    def gradient(self, ids: np.ndarray) -> float:
        """As in `Engine`."""
        return float(self._run(self._gradient, ids)[0])


def cross_entropy(logits: Any, ids: Any) -> Any:
    """Mean over [B, T - 1] of what predicts the next token."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype("float32"), ids[:, 1:]).mean()


def decode(engine: Engine, ids: np.ndarray, steps: int) -> tuple[np.ndarray, list[float]]:
    """Greedy tokens [B, steps + 1] after a prompt, and the seconds of each step."""
    tokens, times = [np.argmax(engine.prefill(ids, ids.shape[1] + steps + 8), -1)], []
    for _ in range(steps):
        start = time.perf_counter()
        logits = engine.step(tokens[-1][:, None].astype(np.int32))
        times.append(time.perf_counter() - start)
        tokens.append(np.argmax(logits, -1))
    return np.stack(tokens, 1), times


def parity(engine: Engine) -> dict[str, Any]:
    """Distance from the official code's outputs for m1_tiny."""
    from safetensors.numpy import load_file

    want = load_file(TINY / "expected.safetensors")
    logits, ids = want["logits"].astype(np.float64), want["input_ids"].astype(np.int32)
    got = engine.logits(ids)
    tokens, _ = decode(engine, ids, want["decode_tokens"].shape[1] - 1)
    return {
        "logits": float(np.sqrt(np.mean((got - logits) ** 2) / np.mean(logits**2))),
        "same argmax": float(np.mean(np.argmax(got, -1) == np.argmax(logits, -1))),
        "greedy tokens": int(np.cumprod(tokens == want["decode_tokens"], 1).sum()),
        "of": want["decode_tokens"].size,
    }


def work(engine: Engine, order: dict[str, Any]) -> Any:
    """Answers one order of the parent."""
    ids = np.random.default_rng(0).integers(0, 32000, order.get("shape", (0, 0)), np.int32)
    start = time.perf_counter()
    match order["what"]:
        case "versions":
            return engine.versions
        case "parity":
            return parity(engine)
        case "decode":
            return statistics.median(decode(engine, ids, STEPS)[1][2:])
        case "first steps":
            return sum(decode(engine, ids, 2)[1])
        case "prefill":
            engine.prefill(ids, ids.shape[1] + STEPS + 8)
        case "gradient":
            engine.gradient(ids)
    return time.perf_counter() - start


class Worker:
    """An engine in a process of its own, which idles while the other one works."""

    def __init__(self, python: str, name: str, folder: Path, dtype: str) -> None:
        # Both compile anew in each run: EasyDeL keeps programs for the next one unasked.
        self.name = name
        command = [python, __file__, "--worker", name, str(folder), dtype]
        environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def __call__(self, what: str, shape: tuple[int, ...] = (0, 0)) -> Any:
        """Asks, and waits for the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"what": what, "shape": shape}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        sys.exit(f"error: the process of {self.name} ended ({what}, {shape}): its output above says why")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def translated(src: Path, dst: Path) -> Path:
    """The checkpoint `src` with the config.json of transformers' class, which EasyDeL reads."""
    fields = json.loads((src / "config.json").read_text())
    rotary = fields["rotary_dim"] / fields["head_dim"]
    fields |= {
        "model_type": "minimax",
        "architectures": ["MiniMaxForCausalLM"],
        "layer_types": [("linear_attention", "full_attention")[kind] for kind in fields.pop("attn_type_list")],
        "linear_attn_alpha_factor": fields["layernorm_linear_attention_alpha"],
        "full_attn_alpha_factor": fields["layernorm_full_attention_alpha"],
        "mlp_alpha_factor": fields["layernorm_mlp_alpha"],
        "partial_rotary_factor": rotary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields["rope_theta"],
            "partial_rotary_factor": rotary,
        },
    }
    dst.mkdir()
    for file in src.iterdir():
        if "safetensors" in file.name:
            (dst / file.name).symlink_to(file)
    (dst / "config.json").write_text(json.dumps(fields))
    return dst


def make_model(folder: Path) -> None:
    """Writes the random model in the official layout, float32."""
    from random_checkpoint import random_entries, read_fields

    from m1jax.config import M1Config
    from m1jax.safetensors import write_folder

    fields = read_fields([f"{key}={value}" for key, value in FIELDS.items()])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    write_folder(folder, random_entries(M1Config.from_dict(fields), "float32", 0), 1 << 30)
    os.sync()  # else it is written while the first row is measured


def workers(pythons: dict[str, str], folders: dict[str, Path], dtype: str) -> dict[str, Worker]:
    """Both engines, with a model loaded."""
    return {name: Worker(python, name, folders[name], dtype) for name, python in pythons.items()}


def measure(both: dict[str, Worker], args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """Rows of the table of speed for one dtype; the two take turns, the median of the repeats counts."""
    work = [("prefill", (1, T), T) for T in args.prefill] + [("decode", (B, PROMPT), B) for B in args.batches]
    rows = []
    for what, shape, tokens in [*work, ("gradient", (1, ROW), ROW)]:
        first = {name: worker("first steps" if what == "decode" else what, shape) for name, worker in both.items()}
        times = {name: [] for name in both}
        for _ in range(args.repeats):
            for name, worker in both.items():
                times[name].append(worker(what, shape))
        rate = {name: tokens / statistics.median(t) for name, t in times.items()}
        size = f"B={shape[0]}" if what == "decode" else str(tokens)
        rows.append({"dtype": dtype, "what": f"{what} {size}", **rate, "first call, s": first})
        ratio = rate["m1jax"] / rate["easydel"]
        cells = [dtype, f"{what} {size}", f"{rate['easydel']:.1f}", f"{rate['m1jax']:.1f}", f"{ratio:.1f}×"]
        print(f"| {' | '.join(cells + [f'{first[name]:.1f}' for name in ('easydel', 'm1jax')])} |", flush=True)
    return rows


def main() -> None:
    """Prints both tables and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easydel", metavar="PYTHON", help="interpreter of an environment with EasyDeL")
    parser.add_argument("--dtypes", nargs="*", default=["float32"], help="of the table of speed")
    parser.add_argument("--prefill", nargs="*", type=int, default=[1024], help="prompt lengths")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes of the decode rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, folder, dtype = args.worker
        engine = {"m1jax": M1Jax, "easydel": EasyDeL}[name](Path(folder), dtype)
        for line in sys.stdin:
            print("answer", json.dumps(work(engine, json.loads(line))), flush=True)
        return
    if not args.easydel:
        parser.error("--easydel is missing: the interpreter of an environment with EasyDeL")
    pythons = {"easydel": args.easydel, "m1jax": sys.executable}
    report: dict[str, Any] = {"date": str(datetime.date.today()), "machine": processor(), "parity": {}, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny = {"easydel": translated(TINY, folder / "tiny"), "m1jax": TINY}
        for dtype in ("float32", "bfloat16"):
            both = workers(pythons, tiny, dtype)
            report["versions"] = {name: worker("versions") for name, worker in both.items()}
            report["parity"][dtype] = {name: worker("parity") for name, worker in both.items()}
            for name, worker in both.items():
                print(f"{dtype}, {name}: {report['parity'][dtype][name]}", flush=True)
                worker.close()
        print(f"\n{report['machine']}; {report['versions']}\n")
        print("| dtype | | EasyDeL, tokens/s | m1jax, tokens/s | ratio | first call, EasyDeL, s | m1jax, s |")
        print("|---|---|---|---|---|---|---|")
        make_model(folder / "m1jax")
        folders = {"easydel": translated(folder / "m1jax", folder / "easydel"), "m1jax": folder / "m1jax"}
        for dtype in args.dtypes:
            both = workers(pythons, folders, dtype)
            report["rows"] += measure(both, args, dtype)
            for worker in both.values():
                worker.close()
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
