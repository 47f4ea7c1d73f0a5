"""A small real tokenizer with M1's special tokens and chat template, random models that use it, and what they write."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from m1jax import M1, M1Config, rows, slots
from m1jax import engine as engine_module
from m1jax.engine import Engine
from m1jax.generation import Generation
from m1jax.model import build
from m1jax.params import ParamSpec
from m1jax.reply import Reply, Request
from m1jax.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
PAGE, LONGEST = 16, 64  # of `limited`, where a test makes pages so small
CONTEXT = 256  # of `random_model`, the smallest cache: few shapes, few compilations
MARKS = ["<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then thinks about it: what is 17 times 24?",
    "<think>\nOkay, the user asks for 17 * 24 = 408.\n</think>\nThe answer is 408. ünïcödé 日本語 🙂🙃",
    "def function(name, arguments):\n    return {'name': name, 'arguments': arguments}\n",
    "system ai_setting=assistant user name=user ai name=assistant tool name=tools",
] * 3


def train_tokenizer(folder: Path, gpt2_files: bool = False) -> None:
    """Writes a byte-level BPE of 400 tokens to `folder`, as `tokenizer.json` or as GPT-2's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=396, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(MARKS)
    if gpt2_files:
        backend.model.save(str(folder))
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        vocab |= {mark: backend.token_to_id(mark) for mark in MARKS}
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    else:
        backend.save(str(folder / "tokenizer.json"))
    shutil.copy(DATA / "tokenizer_config.json", folder)


def tiny_config(**changes: object) -> M1Config:
    """Three layers, one of them softmax; weights large enough that logits differ clearly."""
    values = {
        "model_type": "minimax_m1",
        "vocab_size": 416,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attn_type_list": [0, 1, 0],
        "max_position_embeddings": 4096,
        "postnorm": True,
        "initializer_range": 0.3,
    }
    return M1Config.from_dict(values | changes)


def official_tensors(config: M1Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under their official names."""
    rng = np.random.default_rng(seed)
    M, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    F, V = config.intermediate_size, config.vocab_size

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(scale=config.initializer_range, size=shape).astype(np.float32)

    out = {
        "model.embed_tokens.weight": weight(V, M),
        "lm_head.weight": weight(V, M),
        "model.norm.weight": 1 + weight(M),
    }
    for i, kind in enumerate(config.layer_types):
        at, moe = f"model.layers.{i}.self_attn", f"model.layers.{i}.block_sparse_moe"
        if kind == "lightning":
            out |= {f"{at}.qkv_proj.weight": weight(3 * H * D, M), f"{at}.output_gate.weight": weight(H * D, M)}
            out |= {f"{at}.norm.weight": 1 + weight(H * D), f"{at}.out_proj.weight": weight(M, H * D)}
        else:
            out |= {f"{at}.q_proj.weight": weight(H * D, M), f"{at}.o_proj.weight": weight(M, H * D)}
            out |= {f"{at}.k_proj.weight": weight(K * D, M), f"{at}.v_proj.weight": weight(K * D, M)}
        out |= {
            f"model.layers.{i}.{name}.weight": 1 + weight(M) for name in ("input_layernorm", "post_attention_layernorm")
        }
        out[f"{moe}.gate.weight"] = weight(config.num_local_experts, M)
        for e in range(config.num_local_experts):
            out |= {f"{moe}.experts.{e}.{w}.weight": weight(F, M) for w in ("w1", "w3")}
            out[f"{moe}.experts.{e}.w2.weight"] = weight(M, F)
    return out


def write_model(folder: Path, config: M1Config | None = None, seed: int = 0) -> Path:
    """A model folder as downloaded: config, official safetensors, tokenizer."""
    config = tiny_config() if config is None else config
    train_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config.to_official()), encoding="utf-8")
    save_file(official_tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def random_model(seed: int = 0) -> M1:
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1], max_position_embeddings=CONTEXT)
    rng = np.random.default_rng(seed)

    def leaf(path: str, spec: ParamSpec) -> jax.Array:
        values = np.ones(spec.shape) if spec.init is None else rng.normal(scale=spec.init, size=spec.shape)
        return jax.device_put(values.astype(spec.dtype or "float32"), jax.devices()[0])  # as `load` puts them

    return build(config, leaf)


def small_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `train_tokenizer` writes to a folder."""
    train_tokenizer(folder)
    return Tokenizer.load(folder)


def random_engine(folder: Path) -> Engine:
    """An engine of a random model; no token ends a text, which would happen now and then."""
    engine = Engine(random_model(), small_tokenizer(folder))
    engine.eos_ids = frozenset()
    return engine


def replies(engine: Engine, requests: Sequence[Request], max_rows: int = 4) -> dict[tuple[int, int], Reply]:
    out: dict[tuple[int, int], Reply] = {}
    shown: dict[tuple[int, int], str] = {}
    for event in engine.generate(requests, max_rows):
        key = (event.request, event.reply.sample)
        assert key not in out, "an event after the last"
        shown[key] = shown.get(key, "") + "".join(segment.text for segment in event.segments)
        if event.reply.finish is not None:
            out[key] = event.reply
    assert shown == {key: reply.text for key, reply in out.items()}
    return out


def one(engine: Engine, request: Request) -> Reply:
    return replies(engine, [request])[0, 0]


def counted_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one with each chunk of a prompt that is read."""
    chunks, run = [], engine.run

    def counted(function: Any, *args: Any, **static: int) -> Any:
        chunks.extend([function] * (function is rows.prefill))
        return run(function, *args, **static)

    monkeypatch.setattr(engine, "run", counted)
    return chunks


def limited(engine: Engine, pages: int, prefix_cache: int = 0) -> Engine:
    """An engine with so many pages; what the other has compiled is shared."""
    out = Engine(engine.model, engine.tokenizer, lambda: False, LONGEST, pages * PAGE, prefix_cache)
    out.eos_ids, out._compiled = engine.eos_ids, engine._compiled
    return out


def all_are_free(generation: Generation) -> None:
    """After what has ended and what is remembered nobody has a page."""
    generation._release_ended()
    generation._forget()
    generation._prefixes.clear()
    pool = generation._pool
    assert not any(pool._users)
    for returned, fresh in zip(pool._returned, pool._fresh, strict=True):
        assert sorted(returned) == list(range(fresh))


def tokens(found: dict[tuple[int, int], Any]) -> dict[tuple[int, int], list[int]]:
    """Those of `replies`."""
    return {key: reply.tokens for key, reply in found.items()}


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What a method of `Generation` is called with."""
    calls, method = [], getattr(Generation, name)

    def count(self: Generation, *args: Any) -> Any:
        calls.append((self, *args))
        return method(self, *args)

    monkeypatch.setattr(Generation, name, count)
    return calls


def make_pages_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of PAGE tokens, as many read at once, and little room when a text begins."""
    monkeypatch.setattr(engine_module, "PAGE", PAGE)
    monkeypatch.setattr(engine_module, "CHUNK", PAGE)
    monkeypatch.setattr(slots, "ROOM", 4)
