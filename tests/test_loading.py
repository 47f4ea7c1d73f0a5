"""Safetensors folders: right values for every layout and dtype, one clear line for every kind of damage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import m1jax
from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.loading import load, read_block
from m1jax.params import flatten, param_table
from m1jax.safetensors import Entry, read_file, read_folder, write_file
from m1jax.weights import expected
from tests.checkpoints import DTYPES, TINY, join_header, random_tensors, same_bits, split_header, write_checkpoint
from tests.tools import variant

CONFIG = variant(layer_types=("lightning", "softmax", "lightning"), num_local_experts=3, shared_intermediate_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def check_values(model: m1jax.M1, tensors: dict[str, Any], config: M1Config, layout: Any, dtype: str) -> None:
    """Compares every parameter with its tensors, element by element."""
    params = flatten(model)
    assert {path: value.shape for path, value in params.items()} == {
        path: spec.shape for path, spec in param_table(config).items()
    }
    for name, slot in expected(config, layout).items():
        kind = DTYPES[param_table(config)[slot.target].dtype or dtype]
        ours = np.asarray(params[slot.target][slot.index]).reshape(slot.shape)
        with np.errstate(all="ignore"):
            wanted = tensors[name].astype(kind)
        np.testing.assert_array_equal(ours.astype(np.float32), wanted.astype(np.float32), err_msg=name)
        assert ours.dtype == kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["official", "fused"])
def test_values_of_mixed_dtypes(tmp_path: Path, layout: Any, dtype: str) -> None:
    tensors = random_tensors(CONFIG, tuple(DTYPES), layout)
    model = load(write_checkpoint(tmp_path / "model", CONFIG, tensors), dtype)
    check_values(model, tensors, CONFIG, layout, dtype)
    assert model.config == CONFIG


@pytest.mark.parametrize("kind", ["lightning", "softmax"])
def test_one_kind_of_layer_only(tmp_path: Path, kind: str) -> None:
    config = variant(layer_types=(kind, kind), tie_word_embeddings=True)
    tensors = random_tensors(config)
    check_values(load(write_checkpoint(tmp_path / "m", config, tensors)), tensors, config, "official", "float32")


def test_single_file_of_the_library(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = random_tensors(CONFIG, ("float32", "float16"))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_official()))
    check_values(load(tmp_path), tensors, CONFIG, "official", "float32")


@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saves(tmp_path: Path, original: bool) -> None:
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")
    config = transformers.MiniMaxConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = transformers.MiniMaxForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, save_original_format=original, max_shard_size="10KB")
    names = read_folder(tmp_path)
    assert any("experts.0.w1" in name for name in names) == original
    assert any("slope_rate" in name for name in names)
    ours, state = flatten(load(tmp_path)), theirs.state_dict()
    for layer in range(2):
        gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].float().numpy()
        np.testing.assert_array_equal(ours["moe.gate_up"][layer].reshape(gate_up.shape), gate_up)
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"].float().numpy()
        np.testing.assert_array_equal(ours["moe.down"][layer], down)
    qkv = state["model.layers.0.self_attn.qkv_proj.weight"].float().numpy()
    np.testing.assert_array_equal(ours["lightning.qkv_proj"][0].reshape(qkv.shape), qkv)


@given(st.data())
def test_any_block_of_a_parameter(data: st.DataObject) -> None:
    tensors = read_folder(TINY)
    config = M1Config.from_file(TINY)
    path = data.draw(st.sampled_from(["moe.gate_up", "moe.down", "lightning.qkv_proj", "embed", "moe.router"]))
    shape = param_table(config)[path].shape
    block = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        block.append(slice(start, data.draw(st.integers(start + 1, size))))
    sources = [(slot.index, tensors[name]) for name, slot in expected(config).items() if slot.target == path]
    whole = read_block(sources, shape, tuple(slice(None) for _ in shape), DTYPES["float32"])
    part = read_block(sources, shape, tuple(block), DTYPES["float32"])
    np.testing.assert_array_equal(part, whole[tuple(block)])


def test_cpu_takes_the_buffer_without_a_copy() -> None:
    tensors, config = read_folder(TINY), M1Config.from_file(TINY)
    shape = param_table(config)["embed"].shape
    sources = [((), tensors["model.embed_tokens.weight"])]
    buffer = read_block(sources, shape, (slice(None), slice(None)), DTYPES["float32"])
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    array = jax.make_array_from_callback(shape, device, lambda _: buffer)
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_needs_no_torch() -> None:
    names = ("torch", "transformers", "orbax.checkpoint")
    code = f"import sys, m1jax.loading; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@given(st.lists(st.sampled_from([(0,), (), (3,), (2, 5), (4, 0, 2)]), max_size=5), st.sampled_from(list(DTYPES)))
def test_writer_and_reader_agree_with_the_library(tmp_path_factory: Any, shapes: list[Any], dtype: str) -> None:
    random = np.random.default_rng(0)
    tensors = {f"t{i}": random.standard_normal(shape).astype(DTYPES[dtype]) for i, shape in enumerate(shapes)}
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    write_file(file, [Entry(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()])
    assert same_bits(read_file(file), tensors)
    with safetensors.safe_open(file, "np") as theirs:
        assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == {  # noqa: SIM118
            name: x.shape for name, x in tensors.items()
        }


# --- damage --------------------------------------------------------------------------------------------------------

SHARD, OTHER, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, data = split_header(folder / SHARD)
        change(header)
        join_header(folder / SHARD, header, data)

    return damage


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / SHARD, size)


def swap_offsets(header: dict[str, Any]) -> None:
    tables = [entry for entry in header.values() if entry.get("shape") == [256, 64]]
    first, second = sorted(tables, key=lambda entry: entry["data_offsets"])
    second["data_offsets"] = first["data_offsets"]


def tensor(header: dict[str, Any]) -> dict[str, Any]:
    return header["model.norm.weight"] if "model.norm.weight" in header else header["lm_head.weight"]


def put_twice(folder: Path) -> None:
    header, data = split_header(folder / OTHER)
    extra, contents = split_header(folder / SHARD)
    first, last = extra["lm_head.weight"]["data_offsets"]
    header["lm_head.weight"] = extra["lm_head.weight"] | {"data_offsets": [len(data), len(data) + last - first]}
    join_header(folder / OTHER, header, data + contents[first:last])


def quantized_by_another(folder: Path) -> None:
    """Its tensors have a dtype that is not known either; config.json says why."""
    edit_header(lambda h: tensor(h).update(dtype="F8_E4M3"))(folder)
    edit_json("config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "has no weights"),
    "no index": (lambda f: (f / INDEX).unlink(), "has no weights.*only expected.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no shard": (lambda f: (f / SHARD).unlink(), f"incomplete.*{SHARD}"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} cannot be read"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "index with a path": (edit_json(INDEX, lambda i: i["weight_map"].update(x="../x")), "not a file name"),
    "index and single": (lambda f: shutil.copy(f / SHARD, f / "model.safetensors"), "holds both"),
    "not in its shard": (
        edit_json(INDEX, lambda i: i["weight_map"].update({"lm_head.weight": OTHER})),
        "not in their shard",
    ),
    "nowhere": (edit_json(INDEX, lambda i: i["weight_map"].update({"x": OTHER})), "not in their shard: x "),
    "not in the index": (
        edit_json(INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "does not name.*lm_head.weight",
    ),
    "in two shards": (put_twice, "lm_head.weight is in two shards"),
    "empty": (cut(0), "truncated: 0 bytes"),
    "only a length": (cut(8), "truncated: header of"),
    "half a header": (cut(500), "truncated: header of"),
    "one byte short": (cut((TINY / SHARD).stat().st_size - 1), "truncated: its tensors need"),
    "one byte long": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"), "corrupt: its tensors need"),
    "html": (lambda f: (f / SHARD).write_text("<!DOCTYPE html><html>"), "no safetensors file"),
    "header is no JSON": (lambda f: (f / SHARD).write_bytes(b"\2\0\0\0\0\0\0\0{]"), "header is not JSON"),
    "header is a list": (lambda f: (f / SHARD).write_bytes(b"\2\0\0\0\0\0\0\0[]"), "not a JSON object"),
    "header is deep": (lambda f: (f / SHARD).write_bytes(b"\0\0\1\0\0\0\0\0" + b"[" * 65536), "header is not JSON"),
    "header is binary": (lambda f: (f / SHARD).write_bytes(b"\2\0\0\0\0\0\0\0\xff\xfe"), "header is not JSON"),
    "named twice": (
        lambda f: (f / SHARD).write_bytes(b"\x0d\0\0\0\0\0\0\0" + b'{"a":1,"a":2}'),
        "names a twice",
    ),
    "unknown dtype": (edit_header(lambda h: tensor(h).update(dtype="F8_E4M3")), "unknown dtype 'F8_E4M3'"),
    "quantised by another": (quantized_by_another, "quantization_config .*convert from the unquantised checkpoint"),
    "dtype is no name": (edit_header(lambda h: tensor(h).update(dtype=[])), "unknown dtype"),
    "wrong dtype": (edit_header(lambda h: tensor(h).update(dtype="F32")), "bytes, not"),
    "integers": (edit_header(lambda h: tensor(h).update(dtype="I16")), r"not float32, float16 or bfloat16.*\(int16\)"),
    "wrong shape": (edit_header(lambda h: tensor(h).update(shape=[3])), "bytes, not"),
    "negative shape": (edit_header(lambda h: tensor(h).update(shape=[-1, 2])), "corrupt"),
    "shape is no list": (edit_header(lambda h: tensor(h).update(shape=7)), "corrupt"),
    "three offsets": (edit_header(lambda h: tensor(h).update(data_offsets=[0, 1, 2])), "corrupt"),
    "no offsets": (edit_header(lambda h: tensor(h).pop("data_offsets")), "lacks"),
    "no entry": (edit_header(lambda h: h.update({"lm_head.weight": 5})), "lacks"),
    "overlap": (edit_header(swap_offsets), "overlaps"),
    "gap": (edit_header(lambda h: h.pop("lm_head.weight")), "gap|not in their shard|tensors need"),
    "layers": (
        edit_json("config.json", lambda c: c.update(num_hidden_layers=7, attn_type_list=[0] * 7)),
        "num_hidden_layers = 7, but the weights have 8",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_gives_one_clear_line(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("dtype", ["float16", "int8", "nonsense"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        load(TINY, dtype)


@given(st.data())
def test_no_damage_passes_for_a_traceback(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Random bytes over a header: whatever happens, it is a `UserError` or a model."""
    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("random") / "m"))
    content = bytearray((folder / SHARD).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    (folder / SHARD).write_bytes(content)
    try:
        load(folder)
    except UserError as error:
        assert str(error)
