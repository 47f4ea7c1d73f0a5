"""Checkpoints of a run by themselves."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.model import build
from m1jax.train import saving
from tests.training import CONFIG


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The limit on the size of files stands in for the disk: writes fail in Orbax's threads."""
    code = """
import resource, signal, sys
from pathlib import Path
from m1jax.train import saving
import jax.numpy as jnp
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out, state = Path(sys.argv[1]), {"w": jnp.arange(200_000.0)}
checkpoints = saving.Checkpoints(out, 2, {})
assert checkpoints.save(1, state, {"at": 1}) is None and checkpoints.wait() is None
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
problem = checkpoints.save(2, state, {}) or checkpoints.wait()
assert "step 2 was not written" in problem and "last good one is that of step 1" in problem, problem
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert checkpoints.latest == 1
loaded, position = checkpoints.load(state)
assert (loaded["w"] == state["w"]).all() and position == {"at": 1}
assert checkpoints.save(3, state, {}) is None and checkpoints.close() is None
assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["1", "3"]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_checkpoint_from_before_contents_were_noted_is_read(tmp_path: Path) -> None:
    noted = {"data": "a", "data.contents": "b", "tokenizer": "c", "data.streams": 1}
    state = {"w": jnp.ones(3)}
    old = saving.Checkpoints(tmp_path, 1, {"data": "a"})
    assert old.save(1, state, {"at": 5}) is None and old.close() is None
    new = saving.Checkpoints(tmp_path, 1, noted)
    assert new.load(state)[1] == {"at": 5} and new.save(2, state, {"at": 6}) is None and new.close() is None
    with pytest.raises(UserError, match="tokenizer 'c', not 'd'"):
        saving.Checkpoints(tmp_path, 1, noted | {"tokenizer": "d"}).load(state)
    older = saving.Checkpoints(tmp_path / "older", 1, {"data": "a"})
    assert older.save(1, state, {}) is None and older.close() is None
    with pytest.raises(UserError, match=r"data\.streams 1, not 2"):
        saving.Checkpoints(tmp_path / "older", 1, noted | {"data.streams": 2}).load(state)


def test_a_model_of_one_kind_of_layer_is_written_too(tmp_path: Path) -> None:
    """It has arrays of no layers for the kind that it lacks, which Orbax refuses."""
    config = dataclasses.replace(CONFIG, layer_types=("lightning",) * 2)
    model = build(config, lambda _, spec: jnp.arange(spec.size, dtype=jnp.float32).reshape(spec.shape))
    assert min(leaf.size for leaf in jax.tree.leaves(model)) == 0
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for where in (jax.devices()[0], jax.sharding.NamedSharding(mesh, jax.P())):
        state, out = jax.device_put(model, where), tmp_path / str(isinstance(where, jax.Device))
        checkpoints = saving.Checkpoints(out, 1, {})
        assert checkpoints.save(1, state, {"at": 5}) is None and checkpoints.close() is None
        found, position = saving.Checkpoints(out, 1, {}).load(state)
        assert position == {"at": 5} and jax.tree.structure(found) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert a.sharding == b.sharding and a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
