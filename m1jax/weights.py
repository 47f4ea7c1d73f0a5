"""Which tensor of a PyTorch checkpoint is which part of which parameter: one table, read in both directions.

Matrices are `[out, in]` on both sides, so the only transformation is a reshape: a source tensor, its dimensions split
as in `m1jax.params`, is `parameter[index]` for a few leading indices. A checkpoint with a tensor that is not in the
table, or without one that is, is refused. Letters as in `m1jax.params`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import numpy as np

from m1jax.config import LIGHTNING, SOFTMAX, M1Config
from m1jax.errors import UserError
from m1jax.params import param_table
from m1jax.safetensors import listing

Layout = Literal["official", "fused"]

FLOATS = ("float32", "float16", "bfloat16")  # what weights may be stored in


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors named `pattern`, of shape `dims`, are `target[index]`; an index is a number or a name in the pattern."""

    pattern: str
    target: str
    dims: str
    index: tuple[str | int, ...] = ()

    @property
    def regex(self) -> re.Pattern[str]:
        """Matches the rule's names; groups `layer` and `expert`."""
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(self.pattern)))


def _layer(suffix: str, target: str, dims: str, *index: str | int) -> Rule:
    return Rule("model.layers.{layer}." + suffix, target, dims, ("layer", *index))


_COMMON = (
    Rule("model.embed_tokens.weight", "embed", "V M"),
    _layer("input_layernorm.weight", "block.attn_norm", "M"),
    _layer("self_attn.qkv_proj.weight", "lightning.qkv_proj", "H*3*D M"),
    _layer("self_attn.output_gate.weight", "lightning.output_gate", "H*D M"),
    _layer("self_attn.norm.weight", "lightning.norm", "H*D"),
    _layer("self_attn.out_proj.weight", "lightning.out_proj", "M H*D"),
    _layer("self_attn.q_proj.weight", "softmax.q_proj", "H*D M"),
    _layer("self_attn.k_proj.weight", "softmax.k_proj", "K*D M"),
    _layer("self_attn.v_proj.weight", "softmax.v_proj", "K*D M"),
    _layer("self_attn.o_proj.weight", "softmax.o_proj", "M H*D"),
    _layer("post_attention_layernorm.weight", "block.mlp_norm", "M"),
    _layer("shared_mlp.gate_proj.weight", "shared.gate_up", "I M", 0),
    _layer("shared_mlp.up_proj.weight", "shared.gate_up", "I M", 1),
    _layer("shared_mlp.down_proj.weight", "shared.down", "M I"),
    _layer("coefficient.weight", "shared.coefficient", "1 M"),
)
_TAIL = (
    Rule("model.norm.weight", "norm", "M"),
    Rule("lm_head.weight", "lm_head", "V M"),
)
# MiniMax's own files, and what transformers' save_pretrained writes by default.
_OFFICIAL_MOE = (
    _layer("block_sparse_moe.gate.weight", "moe.router", "E M"),
    _layer("block_sparse_moe.experts.{expert}.w1.weight", "moe.gate_up", "F M", "expert", 0),
    _layer("block_sparse_moe.experts.{expert}.w2.weight", "moe.down", "M F", "expert"),
    _layer("block_sparse_moe.experts.{expert}.w3.weight", "moe.gate_up", "F M", "expert", 1),
)
# transformers in memory, and what save_pretrained(save_original_format=False) writes.
_FUSED_MOE = (
    _layer("mlp.gate.weight", "moe.router", "E M"),
    _layer("mlp.experts.gate_up_proj", "moe.gate_up", "E 2*F M"),
    _layer("mlp.experts.down_proj", "moe.down", "E M F"),
)
RULES: dict[Layout, tuple[Rule, ...]] = {
    "official": (*_COMMON, *_OFFICIAL_MOE, *_TAIL),
    "fused": (*_COMMON, *_FUSED_MOE, *_TAIL),
}

# Read past, because transformers' class keeps these functions of the head and layer numbers as buffers and saves them.
IGNORED = tuple(
    _layer(f"self_attn.{name}", "", "") for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
)

_FIELDS = {
    "L": "num_hidden_layers",
    "V": "vocab_size",
    "M": "hidden_size",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "D": "head_dim",
    "E": "num_local_experts",
    "F": "intermediate_size",
    "I": "shared_intermediate_size",
}


class Described(Protocol):
    """A tensor as far as planning needs it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a source tensor: `parameter target[index]`, reshaped to `shape`."""

    target: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The source tensor that fills `parameter[index]`."""

    index: tuple[int, ...]
    name: str


def expected(config: M1Config, layout: Layout = "official") -> dict[str, Slot]:
    """Every tensor that a checkpoint of this configuration has, in the order of the official files, by name."""
    table = param_table(config)
    rules = [(rule, _shape(config, rule)) for rule in RULES[layout] if rule.target in table]
    first, *last = [(rule, shape) for rule, shape in rules if not rule.index]
    dense = [(rule, shape) for rule, shape in rules if rule.index and "expert" not in rule.index]
    sparse = [(rule, shape) for rule, shape in rules if "expert" in rule.index]
    out = {first[0].pattern: Slot(first[0].target, (), first[1])}
    seen = {LIGHTNING: 0, SOFTMAX: 0}
    for layer, kind in enumerate(config.layer_types):
        places = {LIGHTNING: None, SOFTMAX: None, kind: seen[kind]}
        for rules, experts in ((dense, 1), (sparse, config.num_local_experts)):
            for expert, (rule, shape) in itertools.product(range(experts), rules):
                place = places.get(rule.target.split(".")[0], layer)
                if place is not None:
                    values = {"layer": place, "expert": expert}
                    index = tuple(i if isinstance(i, int) else values[i] for i in rule.index)
                    out[rule.pattern.format(layer=layer, expert=expert)] = Slot(rule.target, index, shape)
        seen[kind] += 1
    return out | {rule.pattern: Slot(rule.target, (), shape) for rule, shape in last}


def plan(config: M1Config, tensors: Mapping[str, Described]) -> dict[str, list[Piece]]:
    """For each parameter of the model the source tensors that fill it.

    Raises:
      UserError: `config` contradicts the tensors, or some are missing, extra, duplicate, misshapen or not of a
        floating dtype; one line names them all.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _match(IGNORED, name)}
    layout = _layout(tensors)
    wanted = expected(config, layout)
    problems = _problems(wanted, tensors, layout)
    if problems:
        contradictions = list(_contradictions(config, tensors, layout))
        if contradictions:
            raise UserError(f"config.json contradicts the weights: {listing(contradictions)}: correct config.json")
        raise UserError(f"the weights do not fit config.json: {'; '.join(problems)}")
    out: dict[str, list[Piece]] = {path: [] for path in param_table(config)}
    for name, slot in wanted.items():
        out[slot.target].append(Piece(slot.index, name))
    return out


def _layout(tensors: Mapping[str, Described]) -> Layout:
    """Official as soon as one official MoE name is there: the rest is then named as a duplicate or missing."""
    if any(_match(_OFFICIAL_MOE, name) for name in tensors):
        return "official"
    return "fused" if any(_match(_FUSED_MOE, name) for name in tensors) else "official"


def _match(rules: tuple[Rule, ...], name: str) -> tuple[Rule, re.Match[str]] | None:
    return next(((rule, found) for rule in rules if (found := _REGEX[rule].fullmatch(name))), None)


_REGEX = {rule: rule.regex for rule in (*_COMMON, *_OFFICIAL_MOE, *_FUSED_MOE, *_TAIL, *IGNORED)}


def _problems(wanted: Mapping[str, Slot], tensors: Mapping[str, Described], layout: Layout) -> list[str]:
    """What keeps the tensors from being the wanted ones, one phrase per kind of problem."""
    other = _FUSED_MOE if layout == "official" else _OFFICIAL_MOE
    surplus = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} is {list(tensors[name].shape)}, not {list(slot.shape)}"
        for name, slot in wanted.items()
        if name in tensors and tensors[name].shape != slot.shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in tensors],
        "unknown": [name for name in surplus if not _match(other, name)],
        "duplicate (the same weights in the other layout)": [name for name in surplus if _match(other, name)],
        "misshapen": shapes,
        "not float32, float16 or bfloat16": [
            f"{name} ({tensors[name].dtype.name})"
            for name in wanted
            if name in tensors and tensors[name].dtype.name not in FLOATS
        ],
    }
    return [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]


def _contradictions(config: M1Config, tensors: Mapping[str, Described], layout: Layout) -> Iterator[str]:
    """Fields of the config that all the weights agree to contradict, with both values."""
    seen, kinds = _observe(tensors, layout)
    for dims, values in sorted(seen.items()):
        ours = config.num_hidden_layers if dims == "L" else _size(config, dims)
        if len(values) == 1 and (value := next(iter(values))) != ours:
            fields = " * ".join(_FIELDS.get(letter, letter) for letter in dims.split("*"))
            yield f"{fields} = {ours}, but the weights have {value}"
    if seen.get("L") == {config.num_hidden_layers}:
        for layer, kind in enumerate(config.layer_types):
            found = kinds.get(layer, set())
            if len(found) == 1 and kind not in found:
                yield f"attn_type_list[{layer}] says {kind}, but the weights have {next(iter(found))} attention"
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        yield "tie_word_embeddings = true, but the weights have lm_head.weight"


def _observe(tensors: Mapping[str, Described], layout: Layout) -> tuple[dict[str, set[int]], dict[int, set[str]]]:
    """The sizes that tensors show for each dimension of the table, and the kinds of attention of each layer."""
    seen: dict[str, set[int]] = {}
    kinds: dict[int, set[str]] = {}
    last = {"layer": -1, "expert": -1}
    for name, tensor in tensors.items():
        match = _match(RULES[layout], name)
        if match is None:
            continue
        rule, found = match
        dims = rule.dims.split()
        if len(dims) == len(tensor.shape):
            for dim, size in zip(dims, tensor.shape, strict=True):
                seen.setdefault(dim, set()).add(size)
        for key, value in found.groupdict().items():
            last[key] = max(last[key], int(value))
        group = rule.target.split(".")[0]
        if group in (LIGHTNING, SOFTMAX):
            kinds.setdefault(int(found["layer"]), set()).add(group)
    if last["expert"] >= 0:
        seen.setdefault("E", set()).add(last["expert"] + 1)
    if last["layer"] >= 0:
        seen["L"] = {last["layer"] + 1}
    seen.setdefault("I", {0})
    return seen, kinds


def _size(config: M1Config, dims: str) -> int:
    """The value of a dimension such as ``H*3*D``."""
    return math.prod(int(x) if x.isdigit() else getattr(config, _FIELDS[x]) for x in dims.split("*"))


def _shape(config: M1Config, rule: Rule) -> tuple[int, ...]:
    return tuple(_size(config, dims) for dims in rule.dims.split())
