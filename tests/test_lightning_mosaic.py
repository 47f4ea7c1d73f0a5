"""The Mosaic sweeps of lightning attention in its interpreter, which needs jax 0.11; what they refuse, on any."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from m1jax.kernels.gpu.case import reduced
from m1jax.kernels.lightning_attention import api, gpu, lightning_attention, log_decay
from m1jax.kernels.lightning_attention.cases import CASES, LightningCase
from tests.tools import TOLERANCE, compare_case, mosaic_races, needs_jax_011, normal, rms_error

MOSAIC = [c for c in reduced(CASES) if not c.packed and c.T > 1 and c.D >= 64 and c.dtype == "bfloat16"]


@needs_jax_011
@pytest.mark.parametrize("case", MOSAIC, ids=lambda case: case.name)
def test_cases(case: LightningCase) -> None:
    assert "mosaic" in case.forms
    compare_case(case, ("mosaic_interpreted",), TOLERANCE["bfloat16"])
    assert not mosaic_races()


@needs_jax_011
@pytest.mark.parametrize("lengths", [(304, 220), (304, 0)])
def test_parts_of_ragged_rows(lengths: tuple[int, int]) -> None:
    """Two parts, of more chunks than there are places for them in shared memory; outputs, states and all gradients."""
    T, H, D = 304, 1, 64
    form = dataclasses.replace(gpu.default_form(D, jnp.bfloat16, False, True, mosaic=True), parts=2)
    qkv, state = normal(0, 2, T, H, 3, D, dtype="bfloat16"), normal(1, 2, H, D, D)
    decay = jnp.asarray(log_decay(2, 3, 9))[:1]
    valid = (jnp.arange(T) < jnp.asarray(lengths)[:, None])[..., None, None]
    into = jnp.where(valid, normal(2, 2, T, H, D), 0).astype(jnp.bfloat16), normal(3, 2, H, D, D)
    assert gpu.Sweep(form, form.forward, qkv, decay, jnp.asarray(lengths), None).parts == 2

    def run(parts: bool) -> tuple[jax.Array, ...]:
        def fn(qkv: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            if parts:
                out, states = gpu.attend(form, qkv, decay, state[None], 0, jnp.asarray(lengths), None)
                return out, states[0]
            named: dict[str, Any] = {"state": state, "lengths": jnp.asarray(lengths), "implementation": "reference"}
            return lightning_attention(qkv, decay, **named)

        (out, after), vjp = jax.vjp(fn, qkv, state)
        if parts:
            assert not np.any(jnp.where(valid, 0, out))
        return jnp.where(valid, out, 0), after, *vjp(into)

    for got, want in zip(run(True), run(False), strict=True):
        assert got.dtype == want.dtype and rms_error(got, want) < TOLERANCE["bfloat16"]


@needs_jax_011
@pytest.mark.parametrize("slope", [1.00001, 1e-7])
def test_the_fastest_and_the_slowest_decay(slope: float) -> None:
    """λ⁶³ of M1's first head is 4e-28; the slowest loses a few millionths in a chunk. Of each row on its own."""
    T, D = 136, 64
    qkv, state = normal(0, 1, T, 1, 3, D, dtype="bfloat16"), normal(1, 1, 1, D, D)
    decay = jnp.asarray([-slope], jnp.float32)
    (got, after), (want, want_after) = (
        lightning_attention(qkv, decay, state=state, implementation=how) for how in ("mosaic_interpreted", "reference")
    )
    assert max(rms_error(got[:, t], want[:, t]) for t in range(T)) < 2 * TOLERANCE["bfloat16"]
    assert rms_error(after, want_after) < TOLERANCE["bfloat16"]


@needs_jax_011
@pytest.mark.parametrize(
    ("slope", "gradient", "scale"), [(0.917, 1e-12, 1.0), (-gpu.FASTEST, 1e-18, 1e-3), (-gpu.FASTEST, 1e5, 1.0)]
)
def test_numbers_of_any_size(slope: float, gradient: float, scale: float) -> None:
    """Values and gradients, for M1's fastest head and the fastest that is taken: of a chunk and one token more."""
    T, D = 72, 64
    qkv, state = (normal(0, 1, T, 1, 3, D) * scale).astype(jnp.bfloat16), normal(1, 1, 1, D, D) * scale**2
    lengths, decay = jnp.asarray([65]), jnp.asarray([-slope], jnp.float32)
    valid = (jnp.arange(T) < lengths[:, None])[..., None, None]
    into = jnp.where(valid, normal(2, 1, T, 1, D), 0).astype(jnp.bfloat16) * gradient, normal(3, 1, 1, D, D) * gradient

    def run(how: Any) -> list[Any]:
        def fn(qkv: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, after = lightning_attention(qkv, decay, state=state, lengths=lengths, implementation=how)
            return jnp.where(valid, out, 0), after

        outputs, vjp = jax.vjp(fn, qkv, state)
        d_qkv, d_state = vjp(into)
        return [*outputs, *jnp.moveaxis(d_qkv, 3, 0), d_state]

    for got, want in zip(run("mosaic_interpreted"), run("reference"), strict=True):
        assert rms_error(got, want) < TOLERANCE["bfloat16"]


@needs_jax_011
def test_a_decay_too_fast_shows_where_it_is_not_known_before() -> None:
    qkv = normal(0, 1, 8, 1, 3, 64, dtype="bfloat16")
    run = jax.jit(lambda decay: lightning_attention(qkv, decay, implementation="mosaic_interpreted"))
    assert np.all(np.isnan(run(jnp.asarray([-1.3]))[0])) and np.all(np.isfinite(run(jnp.asarray([-1.2]))[0]))


def test_what_it_does_not_do_is_refused_and_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(api, "refusal", lambda: None)
    decay = jnp.asarray([-0.5])

    def of(T: int = 4096, D: int = 64, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct((1, T, 1, 3, D), jnp.dtype(dtype))

    assert api._choose(None, of(), False, decay) == "mosaic"
    for qkv, packed, d, why in [
        (of(T=4092), False, decay, "multiple of 8"),
        (of(D=32), False, decay, "head_dim"),
        (of(), True, decay, "without segments"),
        (of(), False, jnp.asarray([-1.5]), "log_decay"),
    ]:
        assert api._choose(None, qkv, packed, d) == "triton"
        with pytest.raises(ValueError, match=f"implementation: 'mosaic' cannot run: .*{why}"):
            api._choose("mosaic", qkv, packed, d)
    assert api._choose(None, of(T=1), False, decay) == api._choose(None, of(T=248), False, decay) == "triton"
    assert api._choose(None, of(T=256), False, decay) == api._choose("mosaic", of(T=8), False, decay) == "mosaic"
    assert api._choose(None, of(dtype="float32"), False, decay) == "xla"
    monkeypatch.setattr(gpu.jax, "__version_info__", (0, 10, 2))
    assert api._choose(None, of(), False, decay) == "triton"
    with pytest.raises(ValueError, match=r"jax 0\.11"):
        api._choose("mosaic_interpreted", of(), False, decay)


def test_parts_fill_the_device() -> None:
    """One program a multiprocessor: M1's heads fill it, fewer are cut into parts."""

    def parts(H: int, T: int) -> int:
        qkv: Any = jax.ShapeDtypeStruct((1, T, H, 3, 128), jnp.bfloat16)
        form = gpu.default_form(128, jnp.bfloat16, False, mosaic=True)
        lengths: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
        return gpu.Sweep(form, form.forward, qkv, jnp.zeros(H), lengths, None).parts

    assert [parts(64, 131072), parts(8, 131072), parts(8, 4096), parts(8, 512)] == [1, 8, 4, 1]


def test_the_choice_on_a_gpu_by_the_version_of_jax() -> None:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    qkv = jax.ShapeDtypeStruct((1, 4096, 1, 3, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        found = api._choose(None, qkv, False, jnp.asarray([-0.5]))  # pyright: ignore[reportArgumentType]
    assert found == ("triton" if jax.__version_info__ < (0, 11) else "mosaic")
