"""`M1Config`: what a MiniMax-M1 `config.json` says, in the official and in transformers' spelling.

Every key of the file is read into a field, required to have the one value that this model computes, or listed as
having no influence on the numbers. Anything else is refused: a silently ignored key is a silently wrong model.
"""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.errors import UserError

LIGHTNING, SOFTMAX = "lightning", "softmax"

# The released files' spelling, transformers', and that of the official classes, which `save_pretrained` writes.
_MODEL_TYPES = ("minimax_m1", "minimax_text_01", "minimax", "MiniMaxM1", "MiniMaxText01")

# file key -> field, where only the name differs. Official spelling first, transformers' second.
_RENAMED = {
    "layernorm_linear_attention_alpha": "lightning_alpha",
    "layernorm_linear_attention_beta": "lightning_beta",
    "layernorm_full_attention_alpha": "softmax_alpha",
    "layernorm_full_attention_beta": "softmax_beta",
    "layernorm_mlp_alpha": "mlp_alpha",
    "layernorm_mlp_beta": "mlp_beta",
    "linear_attn_alpha_factor": "lightning_alpha",
    "linear_attn_beta_factor": "lightning_beta",
    "full_attn_alpha_factor": "softmax_alpha",
    "full_attn_beta_factor": "softmax_beta",
    "mlp_alpha_factor": "mlp_alpha",
    "mlp_beta_factor": "mlp_beta",
    "num_experts": "num_local_experts",
}

# Keys that must have the value this model computes (or be null), and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the model's activation is silu"),
    "attention_dropout": (0.0, "dropout is not part of this model"),
    "router_jitter_noise": (0.0, "router noise is not part of this model"),
    "sliding_window": (None, "softmax attention is over the whole context"),
    "shared_moe_mode": ("sigmoid", "the shared expert is mixed by a sigmoid"),
    "rope_scaling": (None, "rotary embeddings are not scaled"),
    "quantization_config": (None, "convert from the unquantised checkpoint"),
    "is_encoder_decoder": (False, "this is a decoder"),
    "add_cross_attention": (False, "this is a decoder"),
    "pruned_heads": ({}, "heads are not pruned"),
    "attention_bias": (False, "projections have no bias"),
    "mlp_bias": (False, "projections have no bias"),
}

# Keys that do not change what the weights compute.
_WITHOUT_EFFECT = {
    "architectures": "names a Python class",
    "auto_map": "names Python files",
    "transformers_version": "says who wrote the file",
    "_name_or_path": "says where the file came from",
    "dtype": "the compute dtype is chosen at load time",
    "torch_dtype": "the compute dtype is chosen at load time",
    "use_cache": "the state is always returned",
    "output_router_logits": "router logits are asked for by argument",
    "output_attentions": "an output option",
    "output_hidden_states": "an output option",
    "return_dict": "an output option",
    "block_size": "chunk length of another implementation; every chunking gives the same result",
    "pad_token_id": "padding is said by lengths, not by a token",
    "sep_token_id": "not a token of this model",
    "decoder_start_token_id": "not a token of this model",
    "chunk_size_feed_forward": "changes memory, not numbers",
    "problem_type": "for classification heads",
    "id2label": "for classification heads",
    "label2id": "for classification heads",
    "is_decoder": "always true here",
    "attn_implementation": "the kernel is chosen per call",
    "_attn_implementation": "the kernel is chosen per call",
    "_attn_implementation_autoset": "the kernel is chosen per call",
}

# transformers writes these into old files, too: how it generates (here `Sampling` and generation_config.json say so).
_WITHOUT_EFFECT |= dict.fromkeys(
    (
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "prefix", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "output_scores", "suppress_tokens", "task_specific_params", "temperature",
        "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    ),
    "not of the model",
)  # fmt: skip

_LARGEST = float(np.finfo(np.float32).max)  # what the model computes in
_LARGEST_INT = 2**31 - 1

_LAYER_TYPES = {0: LIGHTNING, 1: SOFTMAX, "linear_attention": LIGHTNING, "full_attention": SOFTMAX}


@dataclasses.dataclass(frozen=True)
class M1Config:
    """Shape and constants of a model of the M1 family; field names follow `config.json`, letters the docstrings."""

    vocab_size: int  # V
    hidden_size: int  # M
    intermediate_size: int  # F, width of one expert
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    num_local_experts: int  # E
    num_experts_per_tok: int
    rotary_dim: int  # channels of a head that RoPE turns
    layer_types: tuple[str, ...]  # "lightning" or "softmax" for each layer
    shared_intermediate_size: int = 0
    rope_theta: float = 10_000_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 10_240_000
    postnorm: bool = True
    lightning_alpha: float = 1.0
    lightning_beta: float = 1.0
    softmax_alpha: float = 1.0
    softmax_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_values(self)

    @property
    def lightning_layers(self) -> tuple[int, ...]:
        """Indices of the layers with lightning attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LIGHTNING)

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """Indices of the layers with softmax attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SOFTMAX)

    @classmethod
    def from_file(cls, path: str | Path) -> "M1Config":
        """Reads `path`, a `config.json` or the folder that holds one."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if path.is_dir():
                check_model_folder(path)
            raise UserError(f"{file} does not exist: give a folder with a model's config.json") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON ({error}): download it again") from None
        if not isinstance(values, dict):
            raise UserError(f"{file} holds no JSON object: download it again")
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "M1Config":
        """Reads the contents of a `config.json` (official M1 and Text-01, or transformers' `minimax`).

        Raises:
          UserError: a key is unknown, missing, or has a value that this model does not compute.
        """
        kind = values.get("model_type")
        if kind not in _MODEL_TYPES:
            raise UserError(
                f"model_type {_shown(kind)} is not a MiniMax-M1 model: expected one of {', '.join(_MODEL_TYPES)}"
            )
        fields: dict[str, Any] = {}
        for key, value in values.items():
            _read_key(key, value, fields)
        _check_types(fields, {_RENAMED.get(key, key): key for key in values})
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        if fields.get("head_dim") is None and heads and hidden:
            fields["head_dim"] = hidden // heads
        if fields.get("num_key_value_heads") is None:
            fields["num_key_value_heads"] = heads
        factor = fields.pop("partial_rotary_factor", None)
        if fields.get("head_dim"):
            turned = None if factor is None else int(fields["head_dim"] * factor)
            if fields.get("rotary_dim") is None:
                fields["rotary_dim"] = fields["head_dim"] if turned is None else turned
            elif turned not in (None, fields["rotary_dim"]):
                raise UserError(
                    f"partial_rotary_factor {factor} contradicts rotary_dim {fields['rotary_dim']}: drop one"
                )
        # The official class takes pre-norm residuals where the key is absent; transformers' class has no such key.
        fields.setdefault("postnorm", kind == "minimax")
        fields.setdefault("rope_theta", 1_000_000.0)  # the default of either class; released files name M1's 10,000,000
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if fields.get(name) is None]
        if missing:
            names = ["attn_type_list (or layer_types)" if n == "layer_types" else n for n in missing]
            raise UserError(f"config is missing {', '.join(names)}")
        given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        return cls(**given)

    def to_official(self) -> dict[str, Any]:
        """The same configuration as an official `config.json`; `from_dict` of it is equal to `self`."""
        names = {field: key for key, field in reversed(list(_RENAMED.items())) if field != "num_local_experts"}
        out: dict[str, Any] = {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "layer_types":
                out["attn_type_list"] = [0 if kind == LIGHTNING else 1 for kind in value]
            else:
                out[names.get(field.name, field.name)] = list(value) if isinstance(value, tuple) else value
        return {**out, "hidden_act": "silu", "shared_moe_mode": "sigmoid"}


def _read_key(key: str, value: Any, fields: dict[str, Any]) -> None:
    """Reads one key of a `config.json` into `fields`, or raises `UserError`."""
    if key == "model_type" or key in _WITHOUT_EFFECT:
        return
    if key in _FIXED:
        wanted, why = _FIXED[key]
        if value is not None and value != wanted:
            raise UserError(f"{key} = {_shown(value)} is not supported ({why}): only {wanted!r} is")
        return
    if key in ("attn_type_list", "layer_types"):
        if value is None:
            return
        if not isinstance(value, list | tuple):
            raise UserError(f"{key} = {_shown(value)} is not a list: expected one entry for each layer")
        # true and 1.0 are equal to 1, but whoever wrote them meant something else.
        unknown = [item for item in value if type(item) not in (int, str) or item not in _LAYER_TYPES]
        if unknown:
            raise UserError(f"{key} has {_shown(unknown[0])}: expected 0, 1, 'linear_attention' or 'full_attention'")
        _set(fields, "layer_types", tuple(_LAYER_TYPES[item] for item in value), key)
    elif key == "rope_parameters":
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{key} = {_shown(value)} is not an object: expected rope_type and rope_theta")
        _read_rope(value or {}, fields)
    elif key == "eos_token_id":
        _set(fields, key, tuple(value) if isinstance(value, list) else value, key)
    elif key in _RENAMED or key in _FIELD_NAMES:
        _set(fields, _RENAMED.get(key, key), value, key)
    else:
        known = [*_FIELD_NAMES, *_RENAMED, *_FIXED, *_WITHOUT_EFFECT]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        raise UserError(
            f"unknown key {key!r}: "
            + (f"did you mean {near[0]!r}?" if near else "remove it if it changes nothing that the weights compute")
        )


def _read_rope(rope: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Reads transformers' `rope_parameters`."""
    for key, value in rope.items():
        if key in ("rope_type", "type"):
            if value not in (None, "default"):
                raise UserError(f"rope_parameters: {key} {_shown(value)} is not supported: only 'default' is")
        elif key == "rope_theta":
            _set(fields, "rope_theta", value, "rope_parameters.rope_theta")
        elif key == "partial_rotary_factor":
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"rope_parameters: {key} = {_shown(value)} is not a number")
            if value is not None and not 0 < value <= 1:
                raise UserError(f"rope_parameters: {key} = {_shown(value)} must be above 0 and at most 1")
            fields["partial_rotary_factor"] = value
        else:
            raise UserError(f"rope_parameters: unknown key {key!r}")


def _set(fields: dict[str, Any], name: str, value: Any, key: str) -> None:
    """Stores a field; the two spellings of one field may both be present only if they agree."""
    if fields.get(name) is not None and value is not None and fields[name] != value:
        raise UserError(f"{key} = {_shown(value)} contradicts an earlier key, which says {_shown(fields[name])}")
    if value is not None:
        fields[name] = value


def _shown(value: Any) -> str:
    """The value for an error of one line, however long it is."""
    return reprlib.repr(value)


def _check_types(fields: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> None:
    """Raises `UserError` for a field, absent ones and null aside, that is no number of its kind, or out of range.

    `keys` says what fields are called in the file.
    """
    for field in dataclasses.fields(M1Config):
        value = fields.get(field.name)
        if value is None:
            continue
        says = f"{(keys or {}).get(field.name, field.name)} = {_shown(value)}"
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{says} is not true or false")
        if field.type is int:
            if not _is_integer(value):
                raise UserError(f"{says} is not an integer")
            if value < (0 if field.name == "shared_intermediate_size" else 1):
                raise UserError(f"{says} is too small")
            if value > _LARGEST_INT:
                raise UserError(f"{says} is too large")
        if field.type is float:
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
                raise UserError(f"{says} is not a number")
            if not -_LARGEST <= value <= _LARGEST:
                raise UserError(f"{says} is not a finite number")
            if value < 0 and field.name in ("rms_norm_eps", "initializer_range"):
                raise UserError(f"{says} is negative: expected 0 or more")
            if value <= 0 and field.name == "rope_theta":
                raise UserError(f"{says} must be above 0")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_values(config: M1Config) -> None:
    """Raises `UserError` for values that cannot be a model."""
    _check_types({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    for name, value in (("bos_token_id", config.bos_token_id), ("eos_token_id", config.eos_token_id)):
        tokens: tuple[Any, ...] = value if isinstance(value, tuple) else () if value is None else (value,)
        for token in tokens:
            if not _is_integer(token) or not 0 <= token < config.vocab_size:
                raise UserError(f"{name} = {_shown(token)} is not a token: expected 0 to {config.vocab_size - 1}")
    if len(config.layer_types) != config.num_hidden_layers:
        raise UserError(
            f"attn_type_list has {len(config.layer_types)} entries, num_hidden_layers is {config.num_hidden_layers}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        raise UserError(f"rotary_dim {config.rotary_dim} must be even and at most head_dim {config.head_dim}")
    if config.num_experts_per_tok > config.num_local_experts:
        raise UserError(
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds num_local_experts {config.num_local_experts}"
        )


_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(M1Config) if field.name != "layer_types")


def check_model_folder(path: Path) -> None:
    """Raises `UserError` if a path is no folder, or that of an adapter."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give one with a model's config.json")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{path} is an adapter, not a model: give the model, and this as its adapter")
