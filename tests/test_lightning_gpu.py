"""The GPU form of lightning attention in Triton's interpreter: gradients, packed rows, parts, layers, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from m1jax.kernels.gpu.case import reduced
from m1jax.kernels.lightning_attention import gpu, lightning_attention, log_decay
from m1jax.kernels.lightning_attention.cases import CASES, LightningCase
from tests.test_kernels import gradients, outputs_and_gradients
from tests.tools import TOLERANCE, compare_case, normal, rms_error

H, D, T = 2, 32, 150
DECAY = jnp.asarray(log_decay(H, 3, 9))


def packed() -> jax.Array:
    """A segment that goes on with the state, one of one token, padding inside and at the end; then leading padding.

    More of it than a chunk, and a row of nothing else.
    """
    rows = np.zeros((3, T), np.int32)
    rows[0, :40], rows[0, 40:47], rows[0, 47], rows[0, 50:110], rows[0, 110:145] = 5, 2, 8, 3, 9
    rows[1, 70:110], rows[1, 110:120] = 1, 7
    return jnp.asarray(rows)


def compare(forms: list[Any], dtype: str, segments: jax.Array | None, lengths: tuple[int, ...]) -> None:
    """Every form against the reference: outputs, final states and gradients of all of them."""
    B = len(lengths)
    qkv, state = normal(0, B, T, H, 3, D, dtype=dtype), normal(1, B, H, D, D)
    valid = jnp.arange(T) < jnp.asarray(lengths)[:, None]
    valid = (valid if segments is None else valid & (segments > 0))[..., None, None]

    def run(form: Any) -> tuple[Any, Any]:
        def fn(qkv: jax.Array, state: jax.Array) -> Any:
            if form is None:
                named: dict[str, Any] = {"lengths": jnp.asarray(lengths), "segments": segments}
                out, new = lightning_attention(qkv, DECAY, state=state, implementation="reference", **named)
            else:
                out, new = gpu.attend(form, qkv, DECAY, state[None], 0, jnp.asarray(lengths), segments)
                new = new[0]
            return jnp.where(valid, out, 0), new

        return outputs_and_gradients(fn, qkv, state)

    want = run(None)
    for form in forms:
        got = run(form)
        assert got[0][0].dtype == qkv.dtype and got[0][1].dtype == jnp.float32
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert rms_error(a, b) < TOLERANCE[dtype]
        d_qkv = got[1][0]
        assert not np.any(jnp.where(valid[..., None], 0, d_qkv))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("segments", [None, packed()], ids=["ragged", "packed"])
def test_values_and_gradients(segments: jax.Array | None, dtype: str) -> None:
    form = gpu.default_form(D, jnp.dtype(dtype), segments is not None, interpreted=True)
    form = dataclasses.replace(form, forward=gpu.Tiles(64, 32, 8, 1), backward=gpu.Tiles(64, 32, 8, 1))
    cut = dataclasses.replace(form, forward=gpu.Tiles(16, 32, 8, 1), backward=gpu.Tiles(16, 32, 8, 1), parts=2)
    assert gpu.Sweep(cut, cut.forward, jnp.zeros((1, T, H, 3, D)), DECAY, jnp.zeros(1), None).parts == 2
    compare([form, cut], dtype, segments, (T, 0) if segments is None else (T, 141, T))


@pytest.mark.parametrize("case", reduced(CASES), ids=lambda case: case.name)
def test_cases(case: LightningCase) -> None:
    """The shapes that are timed and compiled, fewer heads and tokens of them."""
    compare_case(case, ("xla", "triton_interpreted"), TOLERANCE[case.dtype])


def test_every_gradient_of_a_single_token() -> None:
    qkv, state = normal(0, 2, 1, H, 3, D), normal(1, 2, H, D, D)

    def run(implementation: Any) -> Any:
        return gradients(lambda x, s: lightning_attention(x, DECAY, state=s, implementation=implementation), qkv, state)

    for got, want in zip(run("triton_interpreted"), run("reference"), strict=True):
        assert rms_error(got, want) < TOLERANCE["float32"]


def test_parts_by_shape() -> None:
    """M1's heads fill the device as they are; few heads and many tokens are cut; short rows are not."""

    def parts(H: int, T: int) -> int:
        qkv = jax.ShapeDtypeStruct((1, T, H, 3, 128), jnp.bfloat16)
        form = gpu.default_form(128, jnp.bfloat16, False)
        out = []

        def trace(qkv: jax.Array) -> jax.Array:
            sweep = gpu.Sweep(form, form.forward, qkv, jnp.zeros(H), jnp.zeros(1, jnp.int32), None)
            out.append(sweep.parts)
            return qkv

        jax.eval_shape(trace, qkv)
        return out[0]

    assert [parts(64, 131072), parts(8, 131072), parts(8, 4096), parts(8, 512), parts(1, 8192)] == [2, 16, 4, 1, 8]


@pytest.mark.parametrize("implementation", ["reference", "xla", "recurrent", "triton_interpreted"])
@pytest.mark.parametrize("length", [1, 5])
def test_one_of_the_states_of_all_layers(length: int, implementation: Any) -> None:
    qkv, states = normal(0, 3, length, H, 3, D), normal(1, 4, 3, H, D, D)
    lengths = jnp.asarray([length, 0, length])
    want, want_state = lightning_attention(qkv, DECAY, state=states[2], lengths=lengths, implementation="reference")
    given: Any = np.asarray(states)
    of_numpy = lightning_attention(qkv, DECAY, state=given, lengths=lengths, layer=2, implementation=implementation)

    @jax.jit
    def call(layer: jax.Array) -> Any:
        named: dict[str, Any] = {"state": states, "layer": layer, "lengths": lengths}
        return lightning_attention(qkv, DECAY, implementation=implementation, **named)

    got, new = call(jnp.asarray(2))
    assert rms_error(got[0], want[0]) < TOLERANCE["float32"] and rms_error(new[2], want_state) < TOLERANCE["float32"]
    assert np.array_equal(new[jnp.asarray([0, 1, 3])], states[jnp.asarray([0, 1, 3])])
    assert np.array_equal(new[2, 1], states[2, 1])
    assert rms_error(of_numpy[1], new) < TOLERANCE["float32"]


@pytest.mark.parametrize("length", [1, 5])
def test_a_traced_layer_out_of_range_touches_no_other_memory(length: int) -> None:
    qkv, states = normal(0, 1, length, H, 3, D), normal(1, 2, 1, H, D, D)

    @jax.jit
    def call(layer: jax.Array) -> Any:
        return lightning_attention(qkv, DECAY, state=states, layer=layer, implementation="triton_interpreted")

    for layer, taken in ((-3, 0), (2, 1)):
        got, want = call(jnp.asarray(layer)), call(jnp.asarray(taken))
        assert all(map(np.array_equal, got, want))


def test_what_cannot_run_says_why() -> None:
    qkv = normal(0, 1, 4, H, 3, 48)
    with pytest.raises(ValueError, match=r"implementation.*CUDA"):
        lightning_attention(normal(0, 1, 4, H, 3, D), DECAY, implementation="triton")
    with pytest.raises(ValueError, match=r"implementation.*head_dim 48"):
        lightning_attention(qkv, DECAY, implementation="triton_interpreted")
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((4,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=r"implementation.*shard_map"):
        jax.eval_shape(lambda x: lightning_attention(x, DECAY, implementation="triton"), normal(0, 1, 4, H, 3, D))


def test_bad_arguments_are_named() -> None:
    qkv, state = normal(0, 2, 4, H, 3, D), normal(1, 2, H, D, D)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("qkv", {"qkv": qkv.astype(jnp.float16)}),
        ("log_decay", {"log_decay": DECAY.astype(jnp.bfloat16)}),
        ("state", {"state": state.astype(jnp.bfloat16)}),
        ("state", {"state": state[:1]}),
        ("lengths", {"lengths": jnp.ones(2)}),
        ("segments", {"segments": jnp.ones((2, 3), jnp.int32)}),
        ("lengths", {"lengths": [4, 4]}),
        ("layer", {"layer": 0, "state": None}),
        ("layer", {"layer": 3, "state": state[None].repeat(3, 0)}),
        ("layer", {"layer": jnp.asarray(-1), "state": state[None].repeat(3, 0)}),
        ("layer", {"layer": 1.0, "state": state[None].repeat(3, 0)}),
        ("state", {"layer": 0, "state": state[None][:0]}),
    ]
    for name, change in bad:
        named: dict[str, Any] = {"qkv": qkv, "log_decay": DECAY, "state": state} | change
        with pytest.raises(ValueError, match=f"^{name}:"):
            lightning_attention(implementation="triton_interpreted", **named)
