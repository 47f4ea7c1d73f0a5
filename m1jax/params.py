"""The parameters of M1, declared once: path, shape, logical axes, dtype and initialisation.

Matrices are `[out, in]`, as in the official checkpoints, so that conversion is reshape and stack; every layer's matrix
of one kind lies in one array with a leading layer axis. Letters: L layers (P lightning, S softmax), V vocabulary, M
hidden size, H heads, K key/value heads, D head_dim, E experts, F expert width, I width of the shared expert.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from m1jax.config import M1Config
from m1jax.kernels.experts.quantized import Quantization, Quantized, stored_shapes


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What is known of a parameter before it exists.

    `axes` names each dimension for the sharding rules; of the axes of size M, `channel` is that of parameters so small
    that every device keeps them whole. `dtype` is None where the compute dtype applies. `init` is
    the standard deviation of a normal distribution, or None for ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | None
    dtype: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        out = 1
        for n in self.shape:
            out *= n
        return out


# Every array of `m1jax.state.M1State` by its path, with its logical axes.
STATE_AXES = {
    "lightning.s": ("layer", "batch", "heads", "head_dim", "value_dim"),
    "cache.k": ("layer", "batch", "kv_heads", "cache", "head_dim"),
    "cache.v": ("layer", "batch", "kv_heads", "cache", "head_dim"),
    "length": ("batch",),
    "pages": ("batch", "page"),
}


QUANTIZED = ("moe.gate_up", "moe.down")  # the experts: 95% of M1's parameters


def param_table(config: M1Config, quantize: Quantization | None = None) -> dict[str, ParamSpec]:
    """Every parameter of the model by its path in the module tree, e.g. ``"moe.gate_up"``.

    With experts quantised, those have two entries each, e.g. ``"moe.gate_up.values"`` and ``"moe.gate_up.scales"``.
    """
    V, M, H, K, D = (
        config.vocab_size,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    L, P, S = config.num_hidden_layers, len(config.lightning_layers), len(config.softmax_layers)
    E, F, width = config.num_local_experts, config.intermediate_size, config.shared_intermediate_size
    std = config.initializer_range

    def weight(axes: str, *shape: int, dtype: str | None = None) -> ParamSpec:
        return ParamSpec(shape, tuple(axes.split()), std, dtype)

    def ones(axes: str, *shape: int) -> ParamSpec:
        return ParamSpec(shape, tuple(axes.split()), None)

    table = {
        "embed": weight("vocab hidden", V, M),
        "block.attn_norm": ones("layer channel", L, M),
        "block.mlp_norm": ones("layer channel", L, M),
        "lightning.qkv_proj": weight("layer heads qkv head_dim hidden", P, H, 3, D, M),
        "lightning.output_gate": weight("layer heads head_dim hidden", P, H, D, M),
        "lightning.norm": ones("layer heads head_dim", P, H, D),
        "lightning.out_proj": weight("layer hidden heads head_dim", P, M, H, D),
        "softmax.q_proj": weight("layer heads head_dim hidden", S, H, D, M),
        "softmax.k_proj": weight("layer kv_heads head_dim hidden", S, K, D, M),
        "softmax.v_proj": weight("layer kv_heads head_dim hidden", S, K, D, M),
        "softmax.o_proj": weight("layer hidden heads head_dim", S, M, H, D),
        "moe.router": weight("layer router channel", L, E, M, dtype="float32"),
        "moe.gate_up": weight("layer experts gate_up expert_width expert_hidden", L, E, 2, F, M),
        "moe.down": weight("layer experts expert_hidden expert_width", L, E, M, F),
        "norm": ones("channel", M),
    }
    if width:
        table["shared.gate_up"] = weight("layer gate_up shared_width hidden", L, 2, width, M)
        table["shared.down"] = weight("layer hidden shared_width", L, M, width)
        table["shared.coefficient"] = weight("layer channel", L, M, dtype="float32")
    if not config.tie_word_embeddings:
        table["lm_head"] = weight("vocab hidden", V, M)
    return table if quantize is None else _quantized(table, quantize)


def _quantized(table: dict[str, ParamSpec], kind: Quantization) -> dict[str, ParamSpec]:
    out = {}
    for path, spec in table.items():
        if path not in QUANTIZED:
            out[path] = spec
            continue
        values, scales = stored_shapes(kind, spec.shape)
        dtype = "int8" if kind == "int8" else "uint8"
        out[f"{path}.values"] = dataclasses.replace(spec, shape=values, dtype=dtype)
        out[f"{path}.scales"] = dataclasses.replace(
            spec, shape=scales, axes=spec.axes[: len(scales)], init=None, dtype="float32"
        )
    return out


def join_quantized(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Puts values and scales of quantised parameters together, under the parameter's own path."""
    out = dict(leaves)
    for path in QUANTIZED:
        if f"{path}.values" in out:
            out[path] = Quantized(out.pop(f"{path}.values"), out.pop(f"{path}.scales"))
    return out


def count(config: M1Config) -> int:
    """Number of parameters; 456,089,655,296 for the released M1."""
    return sum(spec.size for spec in param_table(config).values())


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """``{"moe.down": x}`` to ``{"moe": {"down": x}}``."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split(".")
        node = out
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return out


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a model (or of its gradients) by path, e.g. ``"moe.gate_up"``."""
    return {".".join(names_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def names_of(path: tuple[Any, ...]) -> list[str]:
    """The names on the way to a leaf of a tree: of modules, their parameters, entries of dictionaries."""
    names = (str(getattr(key, "name", getattr(key, "key", ""))) for key in path)
    return [name for name in names if name not in ("", "value")]


Leaf = Callable[[str, ParamSpec], Any]
