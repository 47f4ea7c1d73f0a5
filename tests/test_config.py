"""`config.json` in every spelling of the family; nothing is silently ignored."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from m1jax import presets
from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.presets import find_config
from m1jax.safetensors import INDEX_NAME, read_folder
from tests.tools import SMALL, TINY, variant

OFFICIAL = json.loads((presets.FOLDER / "m1-80k.json").read_text())

# What transformers 5 writes for its own class.
TRANSFORMERS = {
    "architectures": ["MiniMaxForCausalLM"],
    "attention_dropout": 0.0,
    "block_size": 256,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "full_attn_alpha_factor": 3.5,
    "full_attn_beta_factor": 1,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_attn_alpha_factor": 3.25,
    "linear_attn_beta_factor": 0.5,
    "max_position_embeddings": 131072,
    "mlp_alpha_factor": 2,
    "mlp_beta_factor": 1,
    "model_type": "minimax",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 256,
}


def test_official_m1() -> None:
    config = find_config("m1-80k")
    assert config.num_hidden_layers == 80 and config.softmax_layers == tuple(range(7, 80, 8))
    assert len(config.lightning_layers) == 70
    assert config.rotary_dim == 64 and config.head_dim == 128
    assert config.lightning_alpha == pytest.approx(160**0.25, abs=1e-9)
    assert config.postnorm and config.eos_token_id is None


def test_official_text_01() -> None:
    text = {**OFFICIAL, "model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"]}
    assert M1Config.from_dict(text) == M1Config.from_dict(OFFICIAL)
    del text["postnorm"], text["rope_theta"]
    absent = M1Config.from_dict(text)
    assert not absent.postnorm and absent.rope_theta == 1e6  # the official class' defaults


@pytest.mark.parametrize("name", ["MiniMaxM1", "MiniMaxText01"])
def test_what_the_official_classes_save(name: str) -> None:
    assert M1Config.from_dict({**OFFICIAL, "model_type": name}) == M1Config.from_dict(OFFICIAL)


def test_transformers() -> None:
    config = M1Config.from_dict(TRANSFORMERS)
    assert config.layer_types == ("lightning", "softmax")
    assert (config.lightning_alpha, config.lightning_beta) == (3.25, 0.5)
    assert (config.softmax_alpha, config.mlp_alpha) == (3.5, 2)
    assert config.head_dim == 16 and config.rotary_dim == 16 and config.rope_theta == 1e6
    assert config.postnorm and config.eos_token_id == 2
    half = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert M1Config.from_dict({**TRANSFORMERS, "rope_parameters": half}).rotary_dim == 8
    for absent in ({}, None):
        assert M1Config.from_dict({**TRANSFORMERS, "rope_parameters": absent}).rope_theta == 1e6  # the class' default
    assert M1Config.from_dict({**TRANSFORMERS, "eos_token_id": [2, 7]}).eos_token_id == (2, 7)


@pytest.mark.parametrize("config", [SMALL, variant(postnorm=False, eos_token_id=(3, 4), shared_intermediate_size=8)])
def test_official_spelling_round_trips(config: M1Config) -> None:
    assert M1Config.from_dict(json.loads(json.dumps(config.to_official()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"kv_lora_rank": 64}, "unknown key 'kv_lora_rank': remove it"),
        ({"rotary_dims": 64}, "unknown key 'rotary_dims': did you mean 'rotary_dim'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise"),
        ({"shared_moe_mode": "softmax"}, "shared_moe_mode"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_typ": "default"}}, "unknown key 'rope_typ'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "contradicts"),
        ({"rope_parameters": {"partial_rotary_factor": 0.99}}, "partial_rotary_factor 0.99 contradicts rotary_dim"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"attn_type_list": [0, 2]}, "attn_type_list has 2"),
        ({"attn_type_list": [0, 1]}, "attn_type_list has 2 entries, num_hidden_layers is 80"),
        ({"num_key_value_heads": 7}, "num_attention_heads 64 is not a multiple"),
        ({"rotary_dim": 65}, "rotary_dim 65"),
        ({"num_experts_per_tok": 33}, "exceeds num_local_experts"),
        ({"hidden_size": "6144"}, "hidden_size = '6144' is not an integer"),
        ({"vocab_size": 0}, "vocab_size = 0 is too small"),
        ({"vocab_size": None}, "missing vocab_size"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"postnorm": 1}, "postnorm"),
        ({"attn_type_list": 7}, "attn_type_list = 7 is not a list"),
        ({"attn_type_list": [[0], [1]]}, "attn_type_list has [0]: expected 0, 1"),
        ({"attn_type_list": [True, False]}, "attn_type_list has True: expected 0, 1"),
        ({"attn_type_list": [{}]}, "attn_type_list has {}"),
        ({"rope_parameters": ["x"]}, "rope_parameters = ['x'] is not an object"),
        ({"rope_parameters": []}, "rope_parameters = [] is not an object"),
        ({"rope_parameters": {"partial_rotary_factor": "a"}}, "partial_rotary_factor = 'a' is not a number"),
        ({"rope_parameters": {"partial_rotary_factor": 10**400}}, "must be above 0 and at most 1"),
        ({"rope_parameters": {"partial_rotary_factor": float("nan")}}, "must be above 0 and at most 1"),
        ({"num_attention_heads": "2", "head_dim": None}, "num_attention_heads = '2' is not an integer"),
        ({"hidden_size": [64], "head_dim": None}, "hidden_size = [64] is not an integer"),
        ({"head_dim": "128", "rotary_dim": None}, "head_dim = '128' is not an integer"),
        ({"vocab_size": 10**400}, "vocab_size = 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a finite number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0 is negative: expected 0 or more"),
        ({"rms_norm_eps": 10**400}, "is not a finite number"),
        ({"rms_norm_eps": 1e39}, "rms_norm_eps = 1e+39 is not a finite number"),
        ({"rope_theta": 0}, "rope_theta = 0 must be above 0"),
        ({"rope_theta": -5}, "rope_theta = -5 must be above 0"),
        ({"layernorm_mlp_alpha": float("inf")}, "layernorm_mlp_alpha = inf is not a finite number"),
        ({"layernorm_full_attention_beta": "1"}, "layernorm_full_attention_beta = '1' is not a number"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x' is not a token: expected 0 to 200063"),
        ({"eos_token_id": ["x"]}, "eos_token_id = 'x' is not a token"),
        ({"eos_token_id": 2.5}, "eos_token_id = 2.5 is not a token"),
        ({"eos_token_id": [True]}, "eos_token_id = True is not a token"),
        ({"eos_token_id": [3, 200064]}, "eos_token_id = 200064 is not a token"),
        ({"eos_token_id": -1}, "eos_token_id = -1 is not a token"),
        ({"bos_token_id": "x"}, "bos_token_id = 'x' is not a token"),
        ({"hidden_act": ["silu"] * 10**6}, "hidden_act = ['silu', 'silu'"),
        ({"model_type": {"minimax": 1}}, "model_type {'minimax': 1}"),
    ],
)
def test_what_is_not_this_model_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        M1Config.from_dict({**OFFICIAL, **change})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        M1Config.from_file(tmp_path)
    deep, digits = b"[" * 100_000, b'{"vocab_size": ' + b"1" * 5000 + b"}"
    for content in (b"{", b"\xff\xfe", b"[1]", deep, b'{"hidden_act": ' + deep, digits):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=re.escape("config.json")):
            M1Config.from_file(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(deep)
    with pytest.raises(UserError, match=f"{INDEX_NAME} cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        M1Config.from_file(tmp_path)
    assert M1Config.from_file(TINY) == M1Config.from_file(TINY / "config.json")


def test_every_field_is_read_somewhere() -> None:
    """A field that no code but the reader mentions would be one that is silently ignored."""
    root = Path(__file__).parents[1]
    code = "\n".join(path.read_text() for path in (root / "m1jax").glob("*.py") if path.name != "config.py")
    elsewhere = {
        "router_aux_loss_coef",  # read by the balancing loss, which comes with the trainer
        "bos_token_id",  # prompts begin as the chat template says; carried along for export
    }
    unread = {f.name for f in dataclasses.fields(M1Config) if not re.search(rf"\.{f.name}\b", code)}
    assert unread <= elsewhere, unread
