"""python scripts/rollout_agreement.py [--model DIR] [--dtype bfloat16] [--steps 3] [--no-replay] [--no-recurrent] …

How well the log-probabilities of rollout and of training agree, as stage rl reports it every step: Pearson's
correlation on half of the replies of 64 questions with 4 each, for all tasks mixed and for some alone, at two
temperatures. Prints a table of the lowest and highest of so many steps. Nothing is learnt: the learning rate is next to
nothing. With --layers, where they part: of the tokens of worked solutions, whose hidden states are bit by bit the same
after each layer, read token by token and as a whole with the same experts.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m1jax.errors import UserError, main_guard
from m1jax.loading import load
from m1jax.model import M1, embed
from m1jax.nano import default_model
from m1jax.nano.recipe import Chat
from m1jax.nano.training import LENGTH, WINDOWS
from m1jax.rl import stage
from m1jax.rl.rollout import padded_prompts
from m1jax.runtime import use_compilation_cache
from m1jax.stack import Carry, body
from m1jax.state import KVCache, LightningState, M1State
from m1jax.tasks import find
from m1jax.tokenizer import Tokenizer
from m1jax.train.settings import Settings, parse

QUESTIONS, REPLIES = 64, 4
MIXED = "all"
ALONE = ("cipher", "sorting", "addition", "retrieval")
TEMPERATURES = (1.5, 1.0)


def correlations(args: argparse.Namespace, task: str, temperature: float, out: Path) -> list[float]:
    """The correlation of each step's first update."""
    rl: dict[str, Any] = {
        "tasks": [task],
        "temperature": temperature,
        "questions": QUESTIONS,
        "replies": REPLIES,
        "updates": 2,
        "windows": [WINDOWS[-1]],
        "row_tokens": LENGTH,
        "dynamic_sampling": False,
        "replay_routes": not args.no_replay,
        "recurrent": not args.no_recurrent,
    }
    table = {
        "stage": "rl",
        "out": str(out),
        "steps": args.steps,
        "model": {"path": str(args.model or default_model()), "dtype": args.dtype, "remat": "none"},
        "optimizer": {"learning_rate": 1e-30, "warmup": 0, "weight_decay": 0.0},
        "checkpoint": {"every": args.steps},
        "log": {"tensorboard": False},
        "rl": rl,
    }
    stage.run(parse(Settings, table))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["correlation_logp"] for line in lines]


def solutions(folder: Path, count: int) -> tuple[jax.Array, jax.Array]:
    """Prompts with their worked solutions, int32 `[B, T]`, and how many tokens each has."""
    tokenizer, chat = Tokenizer.load(folder), Chat.load()
    problems = [problem for task in find([MIXED]) for problem in task.problems(count, 0)]
    texts = [tokenizer.encode(chat.prompt(problem.question) + problem.reply) for problem in problems]
    tokens, lengths = padded_prompts(texts)
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _traced(carry: Carry) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    s, k, v, hidden, routes = carry.s, carry.k, carry.v, carry.hidden, carry.routes
    assert s is not None and k is not None and v is not None and hidden is not None and routes is not None
    return s, k, v, hidden, routes


@jax.jit
def by_token(model: M1, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states `[L, B, T, M]` after each layer, read token by token, and the experts chosen `[L, B, T, k]`."""
    cfg, (B, T) = model.config, tokens.shape
    kinds = (cfg.num_hidden_layers, B, 1)

    def one(state: M1State, token: jax.Array) -> tuple[M1State, tuple[jax.Array, jax.Array]]:
        x, (k, v) = embed(model, token[:, None]), (state.cache.k, state.cache.v)
        hidden = jnp.zeros((*kinds, x.shape[-1]), x.dtype)
        routes = jnp.zeros((*kinds, cfg.num_experts_per_tok), jnp.int32)
        carry = Carry(x, state.lightning.s, k, v, hidden, None, routes=routes)
        s, k, v, hidden, routes = _traced(body(model, carry, state.length, jnp.ones(B, int)))
        new = M1State(LightningState(s), KVCache(k, v), state.length + 1)
        return new, (hidden[:, :, 0], routes[:, :, 0])

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), lax.scan(one, model.init_state(B, T), tokens.T)[1])


@functools.partial(jax.jit, static_argnames="recurrent")
def whole(model: M1, tokens: jax.Array, routes: jax.Array, recurrent: bool) -> jax.Array:
    """The same hidden states, read as a whole, with these experts; `recurrent` as in `M1.step`."""
    (B, T), x = tokens.shape, embed(model, tokens)
    carry = Carry(x, None, None, None, jnp.zeros((model.config.num_hidden_layers, *x.shape), x.dtype), None)
    hidden = body(model, carry, jnp.zeros(B, int), jnp.full(B, T), routes=routes, recurrent=recurrent).hidden
    assert hidden is not None
    return hidden


def same_by_layer(args: argparse.Namespace) -> list[str]:
    """A table of the share of tokens whose hidden states are the same bit by bit."""
    folder = args.model or default_model()
    model, (tokens, lengths) = load(folder, args.dtype), solutions(folder, 8)
    ours, routes = by_token(model, tokens)
    same = np.asarray(jnp.all(ours == whole(model, tokens, routes, not args.no_recurrent), axis=-1))
    valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    lines = [f"| {args.dtype}, after layer | tokens that are the same |", "|---|---|"]
    kinds = model.config.layer_types
    return lines + [f"| {i} ({kinds[i]}) | {same[i][valid].mean():.2%} |" for i in range(len(kinds))]


@main_guard
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the model that comes with the package")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-replay", action="store_true", help="updates choose experts anew")
    parser.add_argument("--no-recurrent", action="store_true", help="updates read lightning attention in chunks")
    parser.add_argument("--layers", action="store_true", help="where rollout and training part")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError("--steps must be 1 or more")
    use_compilation_cache()
    if args.layers:
        print("\n".join(same_by_layer(args)))
        return
    lines = [f"| {args.dtype} | temperature | lowest | highest |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for temperature in TEMPERATURES:
            for task in (MIXED, *ALONE):
                found = correlations(args, task, temperature, Path(folder) / f"{task}-{temperature}")
                lines.append(f"| {task} | {temperature} | {min(found):.6f} | {max(found):.6f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
