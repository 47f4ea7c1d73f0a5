"""Conversion to an Orbax checkpoint and back: bit for bit, resumable, and never at the cost of what exists."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from m1jax import checkpoint, convert, converting, export, workplace
from m1jax.config import M1Config
from m1jax.converting import convert as run_convert
from m1jax.errors import UserError
from m1jax.exporting import export as run_export
from m1jax.loading import MARKER, PROGRESS, load
from m1jax.params import flatten, param_table
from m1jax.presets import find_config
from m1jax.safetensors import read_folder
from tests.checkpoints import DTYPES, TINY, golden, random_tensors, run, same_bits, write_checkpoint
from tests.tools import variant

CONFIG = variant(layer_types=("lightning", "softmax", "lightning"))
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, converted; not to be changed."""
    path = tmp_path_factory.mktemp("converted") / "m1"
    run_convert(TINY, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- values --------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> M1Config:
    heads = draw(st.sampled_from([1, 2, 4]))
    return variant(
        vocab_size=draw(st.integers(3, 70)),
        hidden_size=draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 17)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([k for k in (1, 2, 4) if k <= heads])),
        head_dim=draw(st.sampled_from([4, 6])),
        num_local_experts=draw(st.integers(2, 4)),
        layer_types=tuple(draw(st.lists(st.sampled_from(["lightning", "softmax"]), min_size=1, max_size=4))),
        shared_intermediate_size=draw(st.sampled_from([0, 5])),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=12)
@given(configs(), st.sets(st.sampled_from(list(DTYPES)), min_size=1), st.integers(0, 99), st.integers(100, 9999))
def test_export_of_convert_is_the_same_bits(
    tmp_path_factory: Any, config: M1Config, dtypes: set[str], seed: int, shard: int
) -> None:
    place = tmp_path_factory.mktemp("bits")
    tensors = random_tensors(config, tuple(sorted(dtypes)), seed=seed)
    run_convert(write_checkpoint(place / "a", config, tensors), place / "b")
    run_export(place / "b", place / "c", shard)
    assert same_bits(read_folder(place / "c"), tensors)
    assert (place / "c" / "config.json").read_bytes() == (place / "a" / "config.json").read_bytes()


def test_fused_layout_comes_back_official(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, tuple(DTYPES), "fused")
    run_convert(write_checkpoint(tmp_path / "a", CONFIG, tensors), tmp_path / "b")
    run_export(tmp_path / "b", tmp_path / "c")
    back = read_folder(tmp_path / "c")
    for layer in range(3):
        gate_up = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        for part, name in enumerate(("w1", "w3")):
            found = back[f"model.layers.{layer}.block_sparse_moe.experts.2.{name}.weight"]
            assert found.dtype == gate_up.dtype
            assert found.view().tobytes() == gate_up.reshape(4, 2, 24, 32)[2, part].tobytes()


def test_golden_index_and_header(converted: Path, tmp_path: Path) -> None:
    run_export(converted, tmp_path / "out", 400_000)
    assert same_bits(read_folder(tmp_path / "out"), golden())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((TINY / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert all((tmp_path / "out" / shard).stat().st_size < 420_000 for shard in shards)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_loads_the_same_model(converted: Path, dtype: str) -> None:
    ours, theirs = flatten(load(converted, dtype)), flatten(load(TINY, dtype))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(value))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_casts_all_but_the_router(tmp_path: Path, dtype: str) -> None:
    run_convert(TINY, tmp_path / "c", dtype)
    stores = checkpoint.open_arrays(tmp_path / "c", param_table(M1Config.from_file(TINY)))
    kinds = {path: store.dtype.numpy_dtype.name for path, store in stores.items()}
    assert kinds.pop("moe.router") == "float32"
    assert set(kinds.values()) == {dtype}


def test_orbax_reads_it_sharded_and_cast(converted: Path) -> None:
    table = param_table(M1Config.from_file(TINY))
    whole = ocp.load(str(converted / "weights"))
    mesh = jax.make_mesh((1, 1), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "expert", None, "tensor"))
    abstract = jax.ShapeDtypeStruct(table["moe.gate_up"].shape, jnp.float32, sharding=sharding)
    part = ocp.load(
        str(converted / "weights"), {**abstract_tree(whole), "moe": abstract_tree(whole["moe"]) | {"gate_up": abstract}}
    )
    assert part["moe"]["gate_up"].sharding == sharding
    np.testing.assert_array_equal(np.asarray(part["moe"]["gate_up"]), whole["moe"]["gate_up"].astype(np.float32))
    theirs = flatten(load(TINY))
    for path, spec in table.items():
        group, _, name = path.rpartition(".")
        found = (whole[group] if group else whole)[name]
        assert found.shape == spec.shape
        np.testing.assert_array_equal(found.astype(np.float32), np.asarray(theirs[path]))


def abstract_tree(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def test_chunks_hold_one_layer_and_expert() -> None:
    table = param_table(find_config("m1-80k"))
    for path, spec in table.items():
        chunk = checkpoint.chunk_shape(spec, 2)
        assert np.prod(chunk) * 2 <= 16 << 20, path
        assert all(size % part == 0 for size, part in zip(spec.shape, chunk, strict=True)), path
    assert checkpoint.chunk_shape(table["moe.gate_up"], 2) == (1, 1, 1, 1152, 6144)


def test_tokenizer_and_templates_go_along(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "a"))
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "LICENSE",
    )
    for name in names:
        (source / name).write_text(name)
    run_convert(source, tmp_path / "b")
    run_export(tmp_path / "b", tmp_path / "c")
    for name in names:
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "c" / name).read_text() == name
    assert not (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "c" / MARKER).exists()


# --- interruptions -------------------------------------------------------------------------------------------------


KILLER = """
import os, signal, sys
from orbax.checkpoint import v1
from m1jax import checkpoint, convert, converting, workplace

def deadly(owner, name):
    old = getattr(owner, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return old(*args, **kwargs)
    setattr(owner, name, call)

converting._BATCH = 100_000
for owner, name in (
    (os, "rename"), (os, "replace"), (os, "fsync"), (converting, "_commit"), (converting, "_pieces"),
    (checkpoint, "create"), (checkpoint, "open_arrays"), (checkpoint.ts, "open"), (v1, "save"),
    (workplace.shutil, "copyfile"),
):
    deadly(owner, name)
left = int(sys.argv.pop())
while True:
    child = os.fork()
    if not child:
        convert.main()
    status = os.waitpid(child, 0)[1]
    print(status, flush=True)
    sys.stdin.readline()
    left += 3
"""


def test_killed_at_any_moment_it_continues(tmp_path: Path, converted: Path) -> None:
    """`kill -9` at ever later moments, each in a process of its own, until one run gets through."""
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(TINY), str(target), "1"]
    steps = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        while True:
            status = server.stdout.readline().strip()
            if status != "9":
                break
            assert not target.exists()
            with pytest.raises(UserError, match=r"unfinished|no config\.json"):
                load(partial)
            progress = partial / PROGRESS
            steps.append(len(progress.read_text().splitlines()) if progress.exists() else 0)
            server.stdin.write("\n")
            server.stdin.flush()
        server.kill()
    assert status.endswith("complete. Compare with: python -m m1jax.convert --verify " + f"{TINY} {target}")
    assert len(set(steps)) > 4, "not killed at enough different moments"
    assert not partial.exists()
    run_export(target, tmp_path / "back")
    assert same_bits(read_folder(tmp_path / "back"), golden())
    assert {name for name in files(target) if "/" not in name} == {name for name in files(converted) if "/" not in name}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("when", range(6))
def test_export_continues(converted: Path, tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [when]

    def dying(*args: Any, old: Any = os.replace) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        old(*args)

    with monkeypatch.context() as patch:
        patch.setattr("m1jax.safetensors.os.replace", dying)
        with pytest.raises(Killed):
            run_export(converted, tmp_path / "out", 200_000)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"unfinished|no config\.json"):
        load(tmp_path / "out.partial")
    run_export(converted, tmp_path / "out", 200_000)
    assert same_bits(read_folder(tmp_path / "out"), golden())
    assert not (tmp_path / "out.partial").exists()
    assert not [file for file in (tmp_path / "out").iterdir() if file.suffix == ".part"]


def test_unfinished_run_of_something_else_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(converting, "carry", stop)
        with pytest.raises(Killed):
            run_convert(TINY, tmp_path / "out")
    before = files(tmp_path / "out.partial")
    with pytest.raises(UserError, match=r"another source or option.*--overwrite"):
        run_convert(TINY, tmp_path / "out", "float32")
    assert files(tmp_path / "out.partial") == before
    run_convert(TINY, tmp_path / "out", "float32", overwrite=True)
    assert checkpoint.read_marker(tmp_path / "out")["dtype"] == "float32"


def test_two_at_once(tmp_path: Path) -> None:
    with (
        workplace.open_workplace(tmp_path / "out", {"a": 1}, False),
        pytest.raises(UserError, match="another process"),
        workplace.open_workplace(tmp_path / "out", {"a": 1}, False),
    ):
        pass


def test_torn_line_of_progress(tmp_path: Path) -> None:
    with pytest.raises(Killed), workplace.open_workplace(tmp_path / "out", {"a": 1}, False) as place:
        place.record(["x"])
        raise Killed
    with (tmp_path / "out.partial" / PROGRESS).open("a") as stream:
        stream.write('["y", "z')
    with workplace.open_workplace(tmp_path / "out", {"a": 1}, False) as place:
        assert place.done == [["x"]]
        place.record(["y"])
        assert (place.path / PROGRESS).read_text() == '{"a": 1}\n["x"]\n["y"]\n'


# --- full disks, and what exists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [convert, export])
def test_too_small_a_disk(
    module: Any, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    assert run(module, TINY if module is convert else converted, tmp_path / "out", monkeypatch=monkeypatch) == 2
    text = capsys.readouterr().err
    assert "MB free" in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


def exhausted(*_: Any, **__: Any) -> None:
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [OS error 28: ENOSPC]")


@pytest.mark.parametrize(
    ("module", "target", "failure"),
    [
        (convert, "m1jax.converting.ts.Transaction.commit_async", exhausted),
        (convert, "orbax.checkpoint.v1.save", exhausted),
        (convert, "m1jax.workplace.shutil.copyfile", full),
        (export, "m1jax.safetensors.os.fsync", full),
        (export, "m1jax.workplace.shutil.copyfile", full),
    ],
)
def test_disk_fills_up(
    module: Any,
    target: str,
    failure: Any,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = (TINY if module is convert else converted), tmp_path / "out"
    shutil.copytree(converted, out)
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        assert run(module, source, out, "--overwrite", monkeypatch=patch) == 2
    text = capsys.readouterr().err
    assert "No space left on device" in text and text.count("\n") == 1
    assert files(out) == before
    assert run(module, source, out, "--overwrite", monkeypatch=monkeypatch) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / MARKER).exists() == (module is convert)


def test_existing_things_are_safe(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial" / "thesis.tex").write_text("...")
    before = files(tmp_path)
    for target in (precious, tmp_path / "file", source, source / "inside", tmp_path, tmp_path / "taken"):
        for flags in ([], ["--overwrite"]):
            assert run(convert, source, target, *flags, monkeypatch=monkeypatch) == 2
            assert run(export, converted, target, *flags, monkeypatch=monkeypatch) == 2 or target == source / "inside"
            shutil.rmtree(source / "inside", ignore_errors=True)
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="give --overwrite"):
        run_convert(source, converted)


def test_a_folder_called_replaced_is_safe(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.tex").write_text("...")
    run_convert(TINY, tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.replaced is in the way"):
        run_convert(TINY, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.replaced" / "thesis.tex").read_text() == "..." and (tmp_path / "out" / MARKER).exists()


def test_a_mount_point_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is a mount point"):
        run_convert(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_path_that_the_file_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (convert, export):
        assert run(module, tmp_path / ("x" * 300), tmp_path / "out", monkeypatch=monkeypatch) == 2
        assert "File name too long" in capsys.readouterr().err


def test_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_convert(TINY, tmp_path / "out")
    assert (tmp_path / "out" / MARKER).exists()


def test_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out.partial"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(convert, TINY, tmp_path / "out", monkeypatch=monkeypatch) == 2
    assert "out.partial: Permission denied" in capsys.readouterr().err


# --- damaged converted checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["load", "export"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "no weights", "marker", "version", "config", "tied"])
def test_damaged_checkpoint(converted: Path, tmp_path: Path, damage: str, module: str) -> None:
    broken = Path(shutil.copytree(converted, tmp_path / "broken"))
    data = max(broken.rglob("d/*"), key=lambda file: file.stat().st_size)
    if damage == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "no weights":
        shutil.rmtree(broken / "weights")
    elif damage in ("config", "tied"):
        change = {"config": {"intermediate_size": 48}, "tied": {"tie_word_embeddings": True}}[damage]
        config = json.loads((broken / "config.json").read_text()) | change
        (broken / "config.json").write_text(json.dumps(config))
    else:
        (broken / MARKER).write_text("{" if damage == "marker" else '{"format": 99}')
    with pytest.raises(UserError, match=r"convert (it |the model )?again") as caught:
        load(broken) if module == "load" else run_export(broken, tmp_path / "out")
    assert "\n" not in str(caught.value)


# --- command lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (convert, ["/nowhere", "out"], "/nowhere does not exist"),
        (convert, [TINY.parent, "out"], "no config.json"),
        (convert, [TINY / "config.json", "out"], "is a file: give the folder"),
        (convert, [TINY, ""], "give a new folder's name"),
        (convert, [TINY, TINY.parent], "must be separate folders"),
        (convert, [TINY, ".."], "give a new folder's name"),
        (convert, [TINY, "/"], "give a new folder's name"),
        (convert, [TINY, "out", "--verify", "--overwrite"], "goes without"),
        (convert, [TINY, "out", "--verify"], "out does not exist"),
        (export, [TINY, "out"], "not a converted checkpoint"),
        (export, ["/nowhere", "out"], "/nowhere does not exist"),
        (export, ["x", "out", "--max-shard-size", "many"], "not a size"),
        (export, ["x", "out", "--max-shard-size", "0"], "not a size"),
        (convert, ["x", "out", "--dtype", "int4"], "invalid choice"),
        (convert, ["x"], "required"),
    ],
)
def test_bad_command_lines(
    module: Any,
    args: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(module, *args, monkeypatch=monkeypatch) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_converting_twice_is_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="converted checkpoint already"):
        run_convert(converted, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kib", 1536), ("10", 10), ("500MB", 500 * 10**6), ("2TB", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert export.parse_size(text) == size
