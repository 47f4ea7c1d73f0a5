"""Parity of two checkpoints, as ``python -m m1jax.convert --verify`` reports it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from m1jax import convert
from m1jax import verify as verify_module
from m1jax.config import M1Config
from m1jax.converting import convert as run_convert
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantization
from m1jax.loading import load, open_parameters
from m1jax.sharding.region import every_axis
from m1jax.verify import compare, layer_by_layer, verify
from tests.checkpoints import TINY, golden, random_tensors, run, write_checkpoint
from tests.tools import rms_error, variant


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, converted; not to be changed."""
    path = tmp_path_factory.mktemp("converted") / "m1"
    run_convert(TINY, path)
    return path


@pytest.fixture(autouse=True)
def one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length is a compilation."""
    monkeypatch.setattr("m1jax.verify._LENGTHS", (7,))


def test_verify(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(TINY, converted)
    assert "same" in capsys.readouterr().out
    tensors = {name: np.array(value) for name, value in golden().items()}
    tensors["model.layers.3.block_sparse_moe.experts.1.w1.weight"][0] *= 2
    other = write_checkpoint(tmp_path / "other", M1Config.from_file(TINY), tensors)
    assert not verify(other, converted)
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_was_rounded_is_rounded_in_the_source(
    tmp_path: Path, quantize: Quantization | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_convert(TINY, tmp_path / "m", dtype="bfloat16", quantize=quantize)
    assert verify(TINY, tmp_path / "m")
    agreement, _, cost = capsys.readouterr().out.partition(f"for information, what {quantize} costs")
    assert "same: " in agreement and bool(cost) == bool(quantize)
    if quantize:  # much apart, and no verdict on it
        assert 1e-4 < float(cost.splitlines()[2].split()[-2]) < 1 and "same" not in cost and "DIFFERENT" not in cost
    tensors = {name: np.array(value) for name, value in golden().items()}
    tensors["model.layers.0.self_attn.out_proj.weight"] *= np.float32(1.004)  # about what bfloat16 rounds
    other = write_checkpoint(tmp_path / "other", M1Config.from_file(TINY), tensors)
    assert not verify(other, tmp_path / "m")


def test_verify_refuses_another_model(converted: Path, tmp_path: Path) -> None:
    config = variant(layer_types=("softmax",))
    other = write_checkpoint(tmp_path / "other", config, random_tensors(config))
    with pytest.raises(UserError, match="different models"):
        verify(other, converted)


def test_verify_commands_exit_code(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(convert, "--verify", TINY, converted, monkeypatch=monkeypatch) == 0
    monkeypatch.setattr("m1jax.verify.verify", lambda *_: False)
    assert run(convert, "--verify", TINY, converted, monkeypatch=monkeypatch) == 1
    monkeypatch.undo()
    assert run(convert, "--verify", TINY, tmp_path, monkeypatch=monkeypatch) == 2
    assert run(convert, TINY, tmp_path / "new", "--mesh", "expert=2", monkeypatch=monkeypatch) == 2


def test_verify_on_a_mesh(converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer lies on all devices; the prompts are padded to rows for each."""
    where = []
    body = verify_module.body
    monkeypatch.setattr(verify_module, "body", lambda *args: (where.append(every_axis()), body(*args))[1])
    assert run(convert, "--verify", TINY, converted, "--mesh", "data=2,seq=2,tensor=2", monkeypatch=monkeypatch) == 0
    assert where and set(where) == {("data", "seq", "tensor")}
    assert "same" in capsys.readouterr().out
    assert run(convert, "--verify", TINY, converted, "--mesh", "expert=3", monkeypatch=monkeypatch) == 2


def test_a_corrupt_tokenizer_is_named(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(converted, tmp_path / "m"))
    (source / "tokenizer.json").write_text("{")
    monkeypatch.setattr("m1jax.verify.layer_by_layer", lambda *_: pytest.fail("computed before both were opened"))
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        verify(source, converted)
    with pytest.raises(UserError, match="nothing does not exist"):
        verify(converted, tmp_path / "nothing")


def test_nan_is_never_parity() -> None:
    one = np.ones((2, 3), np.float32)
    assert not compare("x", one, one * np.nan).same


def test_layer_by_layer_is_the_model() -> None:
    source = open_parameters(TINY)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, 9), dtype=np.int32)
    got = layer_by_layer(source, tokens, np.asarray([9, 4], np.int32))
    want = load(TINY)(tokens)
    assert rms_error(got[0], want[0]) < 1e-6
    assert rms_error(got[1, :4], want[1, :4]) < 1e-6
