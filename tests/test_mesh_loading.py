"""Loading onto meshes: the same values as on one device, from as few bytes as the shards have; refusals."""

import dataclasses
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import m1jax
from m1jax import loading
from m1jax.converting import convert
from m1jax.errors import UserError
from m1jax.model import abstract
from m1jax.params import flatten, param_table
from m1jax.presets import find_config
from m1jax.sharding import sizes
from m1jax.sharding.mesh import MeshShape, abstract_mesh, make_mesh
from m1jax.sharding.placing import Block, pieces, place
from m1jax.sharding.rules import shardings
from m1jax.train.parts import fresh, prepare
from m1jax.train.settings import ModelSettings, Settings
from m1jax.weights import expected
from tests.checkpoints import random_tensors, write_checkpoint
from tests.tools import variant

CONFIG = variant(vocab_size=64, num_key_value_heads=4, num_local_experts=8)
MESHES = ["data=1,expert=4,tensor=1", "data=2,expert=2,tensor=2", "expert=2,tensor=4", "seq=2,expert=2,tensor=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mesh") / "m", CONFIG, random_tensors(CONFIG, ("bfloat16",)))


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    convert(folder, folder.with_name("converted"))
    return folder.with_name("converted")


def mesh_of(text: str) -> jax.sharding.Mesh:
    shape = MeshShape.parse(text)
    return make_mesh(shape, devices=jax.devices()[: shape.size])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("source", ["folder", "converted"])
def test_any_mesh_gives_the_same_values(request: Any, source: str, mesh: str, dtype: str) -> None:
    path = request.getfixturevalue(source)
    whole, there = flatten(m1jax.load(path, dtype)), flatten(m1jax.load(path, dtype, mesh=mesh_of(mesh)))
    table = param_table(CONFIG)
    for name, value in whole.items():
        assert there[name].dtype == value.dtype
        assert len(there[name].sharding.device_set) == MeshShape.parse(mesh).size
        np.testing.assert_array_equal(np.asarray(there[name], np.float32), np.asarray(value, np.float32), err_msg=name)
    experts = there["moe.gate_up"]
    assert experts.addressable_shards[0].data.nbytes < experts.nbytes / 2
    assert table["moe.gate_up"].shape == experts.shape


def test_only_the_shards_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each parameter is read for adds up to the parameter: no block twice, none for devices that are not here."""
    read: dict[str, int] = {}

    def counting(*args: Any) -> Any:
        source = open_parameters(*args)

        def reader(name: str, spec: Any, block: Block, dtype: Any) -> Any:
            out = source.read(name, spec, block, dtype)
            read[name] = read.get(name, 0) + out.size
            return out

        return source._replace(read=reader)

    open_parameters = loading.open_parameters
    monkeypatch.setattr(loading, "open_parameters", counting)
    m1jax.load(folder, mesh=mesh_of(MESHES[1]))
    assert read == {name: spec.size for name, spec in param_table(CONFIG).items()}


def test_training_reads_each_block_once(folder: Path) -> None:
    """Also what several devices hold alike."""
    model = ModelSettings(path=str(folder))
    parts = prepare(Settings("pretrain", "out", 1, mesh="data=2,fsdp=2,expert=2", model=model))
    read: dict[str, int] = {}
    assert parts.source is not None
    reader = parts.source.read

    def counting(name: str, *block: Any) -> Any:
        out = reader(name, *block)
        read[name] = read.get(name, 0) + out.size
        return out

    fresh(dataclasses.replace(parts, source=parts.source._replace(read=counting)))
    assert read == {name: spec.size for name, spec in param_table(CONFIG).items()}


@pytest.mark.parametrize("stream", [False, True])
def test_quantising_while_loading_reads_each_matrix_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Not for values and again for scales, nor for each of the devices that share its in-channels."""
    down, read = param_table(CONFIG)["moe.down"].shape, 0

    def counting(sources: Any, shape: Any, *block: Any) -> Any:
        nonlocal read
        out = read_block(sources, shape, *block)
        read += out.size * (shape == down)
        return out

    read_block = loading.read_block
    monkeypatch.setattr(loading, "read_block", counting)
    monkeypatch.setattr(loading, "place", functools.partial(place, stream=stream, piece=256))
    model = m1jax.load(folder, "bfloat16", "int8", mesh=mesh_of("expert=2,tensor=4"))
    assert read == math.prod(down)
    alone = flatten(m1jax.load(folder, "bfloat16", "int8"))
    for name, value in flatten(model).items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(alone[name], np.float32), err_msg=name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("spec", [(), ("a",), (None, ("b", "a")), ("b", "a"), (("a", "b"),)])
def test_place_reads_each_block_once(spec: Any, stream: bool) -> None:
    """Also in pieces, as blocks go to accelerators."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    x, read = np.arange(16 * 8 * 6, dtype=np.float32).reshape(16, 8, 6), 0

    def reader(block: Block) -> np.ndarray:
        nonlocal read
        read += x[block].size
        assert not stream or x[block].nbytes <= 100
        return np.array(x[block])

    where = NamedSharding(mesh, PartitionSpec(*spec))
    y = place(reader, x.shape, x.dtype, where, stream=stream, piece=100)
    np.testing.assert_array_equal(y, x)
    assert y.sharding == where
    assert read == x.size


def test_devices_that_hold_alike_share_a_buffer_on_cpu() -> None:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    values = loading.aligned_empty((64, 64), np.dtype(np.float32))
    y = place(lambda _: values, (64, 64), values.dtype, NamedSharding(mesh, PartitionSpec()))
    assert {shard.data.unsafe_buffer_pointer() for shard in y.addressable_shards} == {values.ctypes.data}


@pytest.mark.parametrize("shape", [(8, 4, 2, 9, 6), (7, 5), (3,), (1, 1, 1)])
@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_pieces_cover_an_array_once(shape: tuple[int, ...], limit: int) -> None:
    seen = np.zeros(shape, np.int8)
    for block in pieces(shape, 4, limit):
        seen[block] += 1
        assert seen[block].nbytes * 4 <= max(limit, 4 * shape[-1])
    assert (seen == 1).all()


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "read_block", None)
    with pytest.raises(UserError, match="mesh data=3,expert=1,tensor=1 needs 3 devices, 8 are present"):
        m1jax.load(folder, mesh="data=3")
    with pytest.raises(UserError, match=r"heads = 4 cannot be split 8 ways.*sizes that work are 1, 2, 4"):
        m1jax.load(folder, mesh="tensor=8")
    with pytest.raises(UserError, match="unknown axis 'experts'"):
        m1jax.load(folder, mesh="experts=8")


def huge(folder: Path) -> Path:
    """A checkpoint of 912 GB that takes no space: all holes."""
    config = find_config("m1-80k")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_official()))
    header: dict[str, Any] = {}
    end = 0
    for name, slot in expected(config).items():
        size = 2 * int(np.prod(slot.shape))
        header[name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


def test_a_model_larger_than_memory_is_refused_with_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = huge(tmp_path / "m1")
    with pytest.raises(UserError, match=r"needs 1824\.4 GB of memory on this machine in float32, [\d.]+ GB are free: "):
        m1jax.load(path)
    monkeypatch.setattr(sizes, "host_memory", lambda: 141_000_000_000)
    with pytest.raises(UserError) as caught:
        m1jax.load(path, "bfloat16", mesh="expert=8")
    found = re.fullmatch(
        r".* needs 912\.\d GB of memory on this machine in bfloat16, 141\.0 GB are free: "
        r"--dtype bfloat16 --quantize int4 --mesh data=1,expert=2,tensor=1 fits, 136\.8 GB on each of 2 machines",
        str(caught.value),
    )
    assert found, str(caught.value)


def test_what_would_fit_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    config = find_config("m1-80k")
    assert "--mesh data=1,expert=8,tensor=1 fits, 114.1 GB on each of 8" in sizes.remedy(config, "bfloat16", 141e9, 8)
    assert "59.8 GB on each of 8 devices" in sizes.remedy(config, "bfloat16", 64e9, 8)
    assert "--quantize int4 --mesh data=1,expert=4,tensor=1 fits, 68.4" in sizes.remedy(config, "bfloat16", 80e9, 1)
    assert "no mesh" in sizes.remedy(config, "bfloat16", 1e9, 8)
    assert "--dtype float32 --mesh data=1,expert=8,tensor=1 fits, 228.1 GB" in sizes.remedy(config, "float32", 1e12, 8)
    assert sizes.remedy(config, "bfloat16", 940e9, 1) == "--dtype bfloat16 fits, 912.2 GB on one device"
    assert "int4" in sizes.remedy(config, "bfloat16", 60e9, 8)  # 59.8 GB would leave no room for a step
    monkeypatch.setattr(sizes, "host_memory", lambda: 1_000_000)
    sizes.require_room("m", CONFIG, None, "float32")
    monkeypatch.setattr(sizes, "neighbours", lambda: 4)
    with pytest.raises(UserError, match=r"m needs .* on this machine in float32"):
        sizes.require_room("m", CONFIG, None, "float32")


def test_bytes_are_those_of_the_shards() -> None:
    mesh = mesh_of(MESHES[1])
    counted = sizes.tree_bytes(CONFIG, abstract_mesh(MeshShape.parse(MESHES[1])), abstract(CONFIG))
    model = jax.device_put(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(CONFIG)),
        shardings(CONFIG, mesh, abstract(CONFIG)),
    )
    assert counted == {path: leaf.addressable_shards[0].data.nbytes for path, leaf in flatten(model).items()}
