"""Do two checkpoints compute the same? Logits of a few prompts, one layer in memory at a time, on a mesh if asked."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding
from numpy.typing import NDArray

from m1jax.checkpoint import read_marker
from m1jax.errors import UserError
from m1jax.loading import MARKER, Source, open_parameters
from m1jax.model import M1, TOKENS, build, embed, final_norm, head, stretched
from m1jax.params import ParamSpec, param_table
from m1jax.sharding.mesh import parsed_mesh
from m1jax.sharding.placing import Block, place
from m1jax.sharding.region import on_mesh, ways
from m1jax.sharding.rules import check, param_sharding
from m1jax.stack import Carry, all_decays, body
from m1jax.tokenizer import Tokenizer

_LENGTHS = (1, 7, 64)  # tokens of the random prompts
_TEXTS = ("The quick brown fox jumps over the lazy dog.", "1 + 1 =", "Wer reitet so spät durch Nacht und Wind?")
_TOLERANCE = 3e-6  # relative RMS between logits of the same weights


class Parity(NamedTuple):
    """How far the logits of one prompt are apart."""

    prompt: str
    max_abs: float
    relative_rms: float
    argmax: float  # share of positions with the same argmax

    @property
    def same(self) -> bool:
        """Whether the weights can be the same; with NaN they cannot."""
        return self.relative_rms <= _TOLERANCE and self.argmax == 1


def verify(src: Path, dst: Path, mesh: str | None = None) -> bool:
    """Prints a table of the parity in float32 of two checkpoints; true if they agree. Raises `UserError`.

    What was rounded to make `dst`, to bfloat16 or in quantising, is rounded in `src` too while it is read. What
    quantising costs is a second table, of `dst` against `src` as it is, and decides nothing. `mesh` as in `m1jax.load`.
    """
    marker = read_marker(dst) if (dst / MARKER).exists() else {"dtype": "keep", "quantize": None}
    if "adapter" in marker:
        raise UserError(f"{dst} has an adapter in its weights, {marker['adapter']}: {src} has other ones")
    rounded, quantize = marker["dtype"] == "bfloat16", marker["quantize"]
    # Both are opened before the first is computed, which may take long.
    source, other = open_parameters(src, quantize), open_parameters(dst)
    plain = open_parameters(src) if quantize else None
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            devices = parsed_mesh(mesh, source.config, quantize=quantize)
            check(source.config, devices, quantize)
            stack.enter_context(jax.set_mesh(devices))
        wanted, found = _logits(src, _rounding(source) if rounded else source), _logits(dst, other)
        exact = _logits(src, plain) if plain is not None and plain.quantize is None else None
    if {name: logits.shape for name, logits in wanted.items()} != {
        name: logits.shape for name, logits in found.items()
    }:
        raise UserError(f"{src} and {dst} are different models: their vocabularies or tokenizers differ")
    good = all(row.same for row in _table(wanted, found))
    how = [*(["rounded to bfloat16"] if rounded else []), *([f"experts in {quantize}"] if quantize else [])]
    why = ", ".join(["the same weights", *how])
    print(f"{'same' if good else 'DIFFERENT'}: relative RMS at most {_TOLERANCE:.0e} allowed ({why})")
    if exact is not None:
        print(f"\nfor information, what {quantize} costs: {dst} against {src} unrounded")
        _table(exact, found)
    return good


def _table(wanted: Mapping[str, NDArray[np.float32]], found: Mapping[str, NDArray[np.float32]]) -> list[Parity]:
    """The parity of each prompt's logits, printed."""
    rows = [compare(name, wanted[name], found[name]) for name in wanted]
    print(f"{'prompt':<44} {'max abs':>9} {'rel. RMS':>9} {'argmax':>7}")
    for row in rows:
        print(f"{row.prompt:<44} {row.max_abs:>9.2e} {row.relative_rms:>9.2e} {row.argmax:>7.1%}")
    return rows


def _rounding(source: Source) -> Source:
    """Reads what has no dtype of its own as bfloat16 holds it."""

    def read(name: str, spec: ParamSpec, block: tuple[slice, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        values = source.read(name, spec, block, dtype)
        return values if spec.dtype else values.astype(ml_dtypes.bfloat16).astype(dtype)

    return source._replace(read=read)


def compare(prompt: str, wanted: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    """Parity of two arrays of logits `[T, V]`."""
    difference = found.astype(np.float64) - wanted
    scale = np.sqrt(np.mean(wanted.astype(np.float64) ** 2))
    same = np.mean(wanted.argmax(-1) == found.argmax(-1))
    return Parity(prompt, float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)) / scale), float(same))


def _logits(path: Path, source: Source) -> dict[str, NDArray[np.float32]]:
    """Logits `[T, V]` by prompt, in float32."""
    prompts = _prompts(path, source.config.vocab_size)
    lengths = np.asarray([len(tokens) for tokens in prompts.values()], np.int32)
    batch = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, tokens in zip(batch, prompts.values(), strict=True):
        row[: len(tokens)] = tokens
    logits = np.asarray(layer_by_layer(source, batch, lengths))
    return {name: logits[b, : lengths[b]] for b, name in enumerate(prompts)}


def layer_by_layer(source: Source, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> jax.Array:
    """`model(tokens)` in float32 for right-padded rows `[B, T]`, with one layer's parameters in memory at a time.

    On the mesh in use, if there is one.
    """
    config, (B, T), wide = source.config, tokens.shape, (*TOKENS, "channel")
    rows = -B % ways("batch")  # of padding, so that every device has as many

    @jax.jit
    def begin(part: M1, tokens: jax.Array) -> jax.Array:
        return on_mesh(embed, part.config, wide, model=(), tokens=TOKENS)(part, tokens)

    @jax.jit
    def go_on(part: M1, x: jax.Array, lengths: jax.Array, decays: jax.Array) -> jax.Array:
        named = {"model": (), "x": wide, "lengths": ("batch",), "decays": ("layer", "heads")}
        return on_mesh(_one_layer, part.config, wide, **named)(part, x, lengths, decays)

    @jax.jit
    def end(part: M1, x: jax.Array) -> jax.Array:
        def local(part: M1, x: jax.Array) -> jax.Array:
            return head(part, final_norm(part, x))

        return on_mesh(local, part.config, (*TOKENS, "vocab"), model=(), x=wide)(part, x)

    x = begin(_part(source, {"embed"}, None), stretched(jnp.pad(tokens, ((0, rows), (0, 0)))))
    decays, counts = all_decays(config), jnp.pad(lengths, (0, rows))
    for layer in range(config.num_hidden_layers):
        x = go_on(_part(source, set(), layer), x, counts, decays[layer : layer + 1])
    last = _part(source, {"norm", "embed" if config.tie_word_embeddings else "lm_head"}, None)
    return end(last, x)[:B, :T]


def _one_layer(part: M1, x: jax.Array, lengths: jax.Array, decays: jax.Array) -> jax.Array:
    carry = Carry(x, None, None, None, None, None)
    return body(part, carry, jnp.zeros_like(lengths), lengths, decays).x


def _part(source: Source, names: set[str], layer: int | None) -> M1:
    """A model with the parameters `names`, or those of one layer; all others are empty."""
    config = source.config
    kind = config.layer_types[layer or 0]
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(kind,))
    whole = param_table(config, source.quantize)
    before = config.layer_types[: layer or 0].count(kind)
    mesh = jax.sharding.get_mesh()

    def leaf(name: str, spec: ParamSpec) -> jax.Array:
        dtype = np.dtype(spec.dtype or "float32")
        stacked = spec.axes[0] == "layer"
        if 0 in spec.shape or (layer is None if stacked else name not in names):
            return jnp.zeros((0,) * len(spec.shape), dtype)
        at = 0 if not stacked or layer is None else before if name.startswith(kind) else layer

        def read(block: Block) -> NDArray[Any]:
            first = slice(block[0].start + at, block[0].stop + at)
            return source.read(name, whole[name], (first, *block[1:]), dtype)

        where = SingleDeviceSharding(jax.devices()[0]) if mesh.empty else param_sharding(mesh, name, spec)
        return place(read, spec.shape, dtype, where)

    return build(one, leaf, source.quantize)


def _prompts(path: Path, vocab_size: int) -> dict[str, NDArray[np.int32]]:
    """Prompts as int32 `[T]`: random tokens, and where there is a tokenizer, texts."""
    random = np.random.default_rng(0)
    out = {f"{n} random tokens": random.integers(0, vocab_size, n, dtype=np.int32) for n in _LENGTHS}
    if (path / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(path)
        for text in _TEXTS:
            ids = np.asarray(tokenizer.encode(text), np.int32)
            if len(ids) and ids.max() < vocab_size:
                out[repr(text)] = ids
    return out
