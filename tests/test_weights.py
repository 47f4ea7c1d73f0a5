"""The table of names, and the refusal of everything outside it."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.params import count, param_table
from m1jax.presets import find_config
from m1jax.safetensors import listing
from m1jax.weights import IGNORED, RULES, Layout, Slot, expected, plan
from tests.checkpoints import M1_NAMES
from tests.tools import variant

PLAIN = variant(layer_types=("lightning", "lightning", "softmax"))
SHARED = variant(layer_types=("lightning", "softmax"), shared_intermediate_size=12)


@dataclasses.dataclass
class Fake:
    """A tensor without contents."""

    shape: tuple[int, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


def fakes(config: M1Config, layout: Layout = "official") -> dict[str, Any]:
    return {name: Fake(slot.shape) for name, slot in expected(config, layout).items()}


def refusal(config: M1Config, tensors: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        plan(config, tensors)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_full_m1_maps_one_to_one() -> None:
    config = find_config("m1-80k")
    slots = expected(config)
    assert len(M1_NAMES) == 8243
    assert sorted(slots) == sorted(M1_NAMES)
    assert count(config) == sum(math.prod(slot.shape) for slot in slots.values()) == 456_089_655_296
    assert len({re.sub(r"\.\d+\.", ".#.", re.sub(r"\.\d+\.", ".#.", name)) for name in slots}) == 17


@pytest.mark.parametrize("layout", ["official", "fused"])
@pytest.mark.parametrize(
    "config", [PLAIN, SHARED, variant(tie_word_embeddings=True), variant(layer_types=("softmax",))]
)
def test_slots_fill_every_parameter_exactly_once(config: M1Config, layout: Layout) -> None:
    pieces = plan(config, fakes(config, layout))
    slots = expected(config, layout)
    for path, spec in param_table(config).items():
        filled = np.zeros(spec.shape, np.int64)
        for piece in pieces[path]:
            assert math.prod(slots[piece.name].shape) == filled[piece.index].size
            filled[piece.index] += 1
        assert (filled == 1).all()


def test_index_follows_layer_kinds_and_experts() -> None:
    slots = expected(variant(layer_types=("softmax", "lightning", "softmax", "lightning")))
    assert slots["model.layers.3.self_attn.qkv_proj.weight"] == Slot("lightning.qkv_proj", (1,), (96, 32))
    assert slots["model.layers.2.self_attn.k_proj.weight"] == Slot("softmax.k_proj", (1,), (16, 32))
    assert slots["model.layers.2.block_sparse_moe.experts.3.w3.weight"] == Slot("moe.gate_up", (2, 3, 1), (24, 32))
    assert slots["model.layers.2.block_sparse_moe.experts.3.w2.weight"] == Slot("moe.down", (2, 3), (32, 24))


def test_every_rule_is_used() -> None:
    for layout, rules in RULES.items():
        names = expected(SHARED, layout)
        assert all(any(rule.regex.fullmatch(name) for name in names) for rule in rules)


def test_buffers_of_transformers_are_read_past() -> None:
    tensors = fakes(PLAIN, "fused")
    for rule in IGNORED:
        tensors[rule.pattern.format(layer=0)] = Fake((4, 1, 1))
    assert len(plan(PLAIN, tensors)) == len(param_table(PLAIN))


def test_all_problems_are_named_in_one_line() -> None:
    tensors = fakes(PLAIN)
    del tensors["model.layers.1.self_attn.norm.weight"]
    tensors["model.layers.0.self_attn.bias"] = Fake((3,))
    tensors["model.layers.2.block_sparse_moe.experts.0.w2.weight"] = Fake((24, 32))
    tensors["model.layers.2.mlp.experts.down_proj"] = Fake((4, 32, 24))
    tensors["model.norm.weight"].dtype = np.dtype(np.int8)
    text = refusal(PLAIN, tensors)
    assert "1 missing: model.layers.1.self_attn.norm.weight" in text
    assert "1 unknown: model.layers.0.self_attn.bias" in text
    assert "model.layers.2.block_sparse_moe.experts.0.w2.weight is [24, 32], not [32, 24]" in text
    assert "duplicate (the same weights in the other layout): model.layers.2.mlp.experts.down_proj" in text
    assert "model.norm.weight (int8)" in text


def test_all_are_named_however_many() -> None:
    text = refusal(PLAIN, {k: v for k, v in fakes(PLAIN).items() if ".w1." not in k})
    assert "12 missing: model.layers.[0-2].block_sparse_moe.experts.[0-3].w1.weight" in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a", "b.1", "a"], "a, b.1"),
        (["a.0.b", "a.2.b", "a.1.b", "a.10.b", "c"], "a.[0-2,10].b, c"),
        (["a.0.b.0.c", "a.0.b.1.c", "a.1.b.1.c"], "a.0.b.[0-1].c, a.1.b.1.c"),
        (["m-00002-of-00003.x", "m-00003-of-00003.x"], "m-[00002-00003]-of-00003.x"),
    ],
)
def test_numbers_of_names_are_joined(names: list[str], text: str) -> None:
    assert listing(names) == text


@pytest.mark.parametrize("name", ["model.layers.00.input_layernorm.weight", "model.layers.3.input_layernorm.weight "])
def test_names_are_matched_exactly(name: str) -> None:
    assert "unknown" in refusal(PLAIN, fakes(PLAIN) | {name: Fake((32,))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("lightning",) * 2}, "num_hidden_layers = 2, but the weights have 3"),
        (
            {"layer_types": ("lightning", "softmax", "softmax")},
            "attn_type_list[1] says softmax, but the weights have lightn",
        ),
        ({"hidden_size": 40}, "hidden_size = 40, but the weights have 32"),
        ({"vocab_size": 60}, "vocab_size = 60, but the weights have 61"),
        ({"num_local_experts": 8}, "num_local_experts = 8, but the weights have 4"),
        ({"num_local_experts": 2}, "num_local_experts = 2, but the weights have 4"),
        ({"intermediate_size": 16}, "intermediate_size = 16, but the weights have 24"),
        ({"head_dim": 16}, "num_attention_heads * head_dim = 64, but the weights have 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads * head_dim = 32, but the weights have 16"),
        ({"shared_intermediate_size": 8}, "shared_intermediate_size = 8, but the weights have 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = true, but the weights have lm_head.weight"),
    ],
)
def test_contradicting_field_is_named_with_both_values(changes: dict[str, Any], message: str) -> None:
    for layout in ("official", "fused"):
        text = refusal(variant(**{"layer_types": PLAIN.layer_types, **changes}), fakes(PLAIN, layout))
        assert text.startswith("config.json contradicts the weights: ")
        assert message in text


def test_shared_expert_in_the_weights_only() -> None:
    text = refusal(dataclasses.replace(SHARED, shared_intermediate_size=0), fakes(SHARED))
    assert "shared_intermediate_size = 0, but the weights have 12" in text


def test_weights_of_another_prefix_are_no_contradiction() -> None:
    text = refusal(PLAIN, {f"m.{name}": tensor for name, tensor in fakes(PLAIN).items()})
    assert "contradicts" not in text and "model.embed_tokens.weight" in text


def test_one_wrong_tensor_is_no_contradiction() -> None:
    tensors = fakes(PLAIN)
    tensors["lm_head.weight"] = Fake((61, 31))
    assert "lm_head.weight is [61, 31], not [61, 32]" in refusal(PLAIN, tensors)
