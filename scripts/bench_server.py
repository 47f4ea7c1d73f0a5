"""python scripts/bench_server.py [--clients 1 8 32] [--turns 8] [--out FILE.json]

Tokens per second of `m1jax.serve` and of `transformers serve`, and seconds until the first token of each turn of a
conversation: same weights, same machine, one server after the other. The model has 61M parameters (hidden 512, 8 layers
7:1, 8 heads × 64, 8 experts top-2, M1-nano's tokenizer), float32, greedy.

Tokens per second: each of so many clients sends three prompts of about 40 tokens, one after the other, and is sent 128
tokens for each. A conversation: each turn adds about 600 tokens to the prompt, which is sent whole; also with
`--prefix-cache 0`. Each server has answered all once before; of conversations the median of three counts. transformers
batches only what has keys and values in all layers (`--continuous-batching` refuses linear attention): it answers
one after the other. Needs the extras `serve` and `parity`, and transformers[serving].
"""

import argparse
import contextlib
import datetime
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import torch
import transformers
from machine import processor

from m1jax.nano import default_model

TOKENS, REQUESTS, CONTEXT = 128, 3, 8192
WORDS = "one two three four five six seven eight nine ten eleven twelve"


def make_model(folder: Path) -> None:
    """Writes the random model as transformers saves it, with M1-nano's tokenizer; no token ends a text."""
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=600, hidden_size=512, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        layer_types=["linear_attention"] * 7 + ["full_attention"], num_key_value_heads=2, head_dim=64,
        num_local_experts=8, num_experts_per_tok=2, linear_attn_alpha_factor=3.5, full_attn_alpha_factor=3.5,
        mlp_alpha_factor=3.5, max_position_embeddings=32768, eos_token_id=None, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    )  # fmt: skip
    transformers.MiniMaxForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model() / name, folder)


@contextlib.contextmanager
def serving(command: Sequence[str], name: str) -> Iterator["Client"]:
    """A server for so long, which answers to the model's name."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = ("--host", "127.0.0.1", "--port", str(port))
    process = subprocess.Popen([*command, *address], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        client = Client(port, name)
        client.wait(process)
        yield client
    finally:
        process.terminate()
        process.wait()


class Client:
    """Asks a server for completions."""

    def __init__(self, port: int, model: str) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}/v1/completions", model

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the server answers."""
        while True:
            try:
                self.tokens("Hello", 1)
                return
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with {process.returncode}") from None
                time.sleep(0.5)

    def tokens(self, prompt: str, count: int) -> int:
        """How many tokens were sent for a prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)["usage"]["completion_tokens"]

    def rate(self, clients: int) -> float:
        """Tokens per second that so many clients are sent."""
        sent: list[int] = []

        def ask(client: int) -> None:
            sent.extend(self.tokens(f"{client} {turn} {WORDS}", TOKENS) for turn in range(REQUESTS))

        threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(sent) / (time.perf_counter() - start)

    def conversation(self, number: int, turns: int) -> list[float]:
        """Seconds until the first token of each turn is there."""
        prompt, times = str(number), []
        for turn in range(turns):
            prompt += f" turn {turn}: {WORDS * 16}"
            start = time.perf_counter()
            self.tokens(prompt, 1)
            times.append(time.perf_counter() - start)
        return times


def measure(client: Client, clients: Sequence[int], turns: int) -> dict[str, Any]:
    """What a server does, after it has done all once."""
    for n in clients:
        client.rate(n)
    client.conversation(0, turns)
    conversations = [client.conversation(1 + i, turns) for i in range(3)]
    times = [statistics.median(turn) for turn in zip(*conversations, strict=True)]
    return {"tokens_per_second": {n: client.rate(n) for n in clients}, "first_token_seconds": times}


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers)}
    print(f"{processor()}; {versions}\n", flush=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        ours = [sys.executable, "-m", "m1jax.serve", "--model", folder, "--name", "m", "--context", str(CONTEXT)]
        ours += ["--batch-size", str(max(args.clients))]
        theirs = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--device", "cpu"]
        for what, command, name in (
            ("m1jax", ours, "m"),
            ("m1jax, --prefix-cache 0", [*ours, "--prefix-cache", "0"], "m"),
            ("transformers", [*theirs, "--dtype", "float32"], folder),
        ):
            with serving(command, name) as client:
                found[what] = measure(client, args.clients, args.turns)
            print(f"{what} measured", file=sys.stderr, flush=True)
    print(f"| | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}")
    for n in args.clients:
        cells = (f"{x['tokens_per_second'][n]:.0f}" for x in found.values())
        print(f"| tokens/s, clients: {n} | {' | '.join(cells)} |")
    for turn in range(args.turns):
        cells = (f"{1e3 * x['first_token_seconds'][turn]:.0f}" for x in found.values())
        print(f"| first token of turn {turn + 1}, ms | {' | '.join(cells)} |")
    if args.out:
        report = {"date": str(datetime.date.today()), "machine": processor(), "versions": versions, **found}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
