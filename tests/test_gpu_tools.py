"""What the GPU kernels' tests and checks stand on: the interpreter, the target of a trace, the reports."""

import dataclasses
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from m1jax.kernels.gpu import aot, capability, interpret, launch, refusal
from tests import triton_kernels
from tests.tools import rms_error

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def mesh(device: AbstractDevice, size: int = 1, kind: AxisType = AxisType.Auto) -> AbstractMesh:
    return AbstractMesh((size,), ("x",), (kind,), abstract_device=device)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_interpreter_multiplies_and_rounds_as_a_gpu_does(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((16, 16)).astype(dtype) for _ in range(2))
    product, rounded = np.zeros((16, 16), np.float32), np.zeros((16, 16), ml_dtypes.bfloat16)
    interpret.run(triton_kernels.product, (1,), a, b, product, rounded, N=16)
    want = a.astype(np.float64) @ b.astype(np.float64)
    assert rms_error(product, want) < 1e-6
    assert np.array_equal(rounded, product.astype(ml_dtypes.bfloat16))


def test_launch_in_place_inside_jit() -> None:
    x = jnp.arange(8, dtype=jnp.float32)

    @jax.jit
    def twice(x: jax.Array) -> jax.Array:
        for _ in range(2):
            (x,) = launch(
                triton_kernels.add, x, 1.5, out=[jax.ShapeDtypeStruct(x.shape, x.dtype)], grid=(2,), warps=1, stages=1,
                aliases={0: 0}, interpreted=True, N=4,
            )  # fmt: skip
        return x

    assert np.array_equal(twice(x), np.arange(8) + 3.0)
    assert np.array_equal(x, np.arange(8))


def test_what_a_kernel_does_not_write_shows() -> None:
    x = jnp.zeros(8)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    (y,) = launch(triton_kernels.add, x, 1.0, out=out, grid=(1,), warps=1, stages=1, interpreted=True, N=4)
    assert np.array_equal(np.isnan(y), np.arange(8) >= 4)


def test_what_a_kernel_touches_outside_its_arrays_shows() -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(Exception, match="outside its arrays"):
        interpret.run(triton_kernels.add, (3,), x, 1.0, np.zeros_like(x), N=4)


def test_kernels_at_once_in_the_interpreter() -> None:
    """XLA calls the host from several threads where nothing orders the calls; the interpreter has one state for all."""

    def raised(amount: int) -> np.ndarray:
        out = np.full(64, np.nan, np.float32)
        interpret.run(triton_kernels.add, (16,), np.zeros(64, np.float32), float(amount), out, N=4)
        return out

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with futures.ThreadPoolExecutor(4) as threads:
            for amount, got in enumerate(threads.map(raised, range(16))):
                assert np.array_equal(got, np.full(64, amount))
    finally:
        sys.setswitchinterval(before)


def test_target_is_the_device_of_the_mesh() -> None:
    assert capability() is None  # the tests run on the CPU
    assert "CUDA" in str(refusal())
    found = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        found.append((capability(), refusal()))
        return x

    traced.trace(jax.ShapeDtypeStruct((), jnp.float32))
    with jax.sharding.use_abstract_mesh(mesh(H200)):
        traced.trace(jax.ShapeDtypeStruct((), jnp.float32))
    assert found == [(None, refusal()), (90, None)]  # the second is traced again
    with jax.sharding.use_abstract_mesh(mesh(AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu"))):
        assert capability() == 80 and "Hopper" in str(refusal())


def test_a_partitioned_array_is_refused_outside_shard_map() -> None:
    with jax.sharding.use_abstract_mesh(mesh(H200, 4)):
        assert "shard_map" in str(refusal())
    with jax.sharding.use_abstract_mesh(mesh(H200, 4, AxisType.Manual)):
        assert refusal() is None


def test_faults_of_a_kernel() -> None:
    good = aot.Report("k", registers=255, spills=0, shared=aot.SHARED_MEMORY, hgmma=4, sass="")
    assert good.faults(matmul=True) == []
    bad = aot.Report("k", registers=255, spills=2, shared=aot.SHARED_MEMORY + 1, hgmma=0, sass="")
    assert [f.split()[0] for f in bad.faults(matmul=True)] == ["2", str(aot.SHARED_MEMORY + 1), "no"]
    assert len(bad.faults(matmul=False)) == 2
    slow = dataclasses.replace(good, warnings="Potential Performance Loss: serialized")
    assert slow.faults(matmul=True) == ["Potential Performance Loss: serialized"]


def test_what_mosaics_compiler_leaves_is_read_once(tmp_path: Path) -> None:
    assert not aot.mosaic_reports("k", tmp_path)
    loss = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    for name, text in {
        "body_0.ptxas": f"ptxas info : {loss}\nptxas info : Used 168 registers, used 16 barriers",
        "body_0.resources.txt": "Resources(smem_scratch_bytes=196608, tmem_scratch_cols=0)",
        "body_0.sass_ctrl": "HGMMA.64x64x16\nSTL [R1]\nHGMMA.64x64x16",
        "body_1.ptxas": "ptxas info : Used 90 registers",
        "body_1.resources.txt": "Resources(smem_scratch_bytes=1024)",
        "body_1.sass_ctrl": "FADD R1, R2, R3",
        "body_2.ptx": "of one that was not assembled",
    }.items():
        (tmp_path / name).write_text(text)
    report, other = aot.mosaic_reports("k", tmp_path)
    assert (report.registers, report.spills, report.shared, report.hgmma) == (168, 1, 196608, 2)
    assert (other.registers, other.spills, other.shared, other.hgmma) == (90, 0, 1024, 0)
    assert report.warnings == loss.removeprefix("(C7510) ") and not list(tmp_path.iterdir())
    assert not report.crowded and not other.warnings


def test_a_warp_group_that_uses_more_registers_than_it_keeps() -> None:
    """As the assembler wrote it: 128 registers where 64 are kept, of which a GPU makes an illegal instruction.

    Of those kept, two are the program counter's.
    """
    first = "IMAD R127, R1, R2, RZ ;\nUSETMAXREG.DEALLOC.CTAPOOL 0x40 ;\nPRMT R127, R28, 0x7632, R127 ;\nEXIT ;\n"
    second = "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0 ;\nFADD R157, R0, R1 ;\n"
    report = aot._counted("k", 128, 0, first + second)
    assert report.faults(matmul=False) == ["a warp group uses 128 registers of the 62 that it keeps"]
    assert not aot._counted("k", 128, 0, (first + second).replace("R127", "R61")).faults(matmul=False)
    assert aot._counted("k", 128, 0, (first + second).replace("R127", "R62")).faults(matmul=False)
    # Code that is seldom run stands after the other group's, and that before which a group changes its registers, where
    # those that are done also come by, is its own.
    seldom = (
        "USETMAXREG.DEALLOC.CTAPOOL 0x28 ;\n@!P1 BRA `(.L_x_2) ;\n.L_x_1:\nIADD3 R37, R1, R2 ;\n@P1 BRA `(.L_x_4) ;\n"
    )
    others = f"FADD R90, R0, R1 ;\n{second}.L_x_3:\n@P2 BRA `(.L_x_3) ;\nFADD R157, R0, R1 ;\n.L_x_4:\nEXIT ;\n"
    for register, faults in (("R37", 0), ("R38", 1)):
        far = f".L_x_2:\nIADD3 {register}, R1, R2 ;\nBRA `(.L_x_1) ;"
        assert len(aot._counted("k", 168, 0, seldom + others + far).crowded) == faults
    # Who leaves by a conditional exit has run what stands before it.
    leaving = "USETMAXREG.DEALLOC.CTAPOOL 0x28 ;\nIADD3 R40, R1, R2 ;\n@P1 EXIT ;\n" + second
    assert aot._counted("k", 168, 0, leaving).crowded
    with pytest.raises(RuntimeError, match="cannot follow CALL"):
        _ = aot._counted("k", 168, 0, leaving + "CALL.REL.NOINC `($f) ;\n").crowded
    for text, last in {
        "LDS.128 R56, [R80+0x10] ;": 59,
        "IMAD.WIDE.U32 R2, R3, 0x4, R6 ;": 7,
        "CS2R R78, SRZ ;": 79,
        "CS2R.32 R78, SR_CLOCKLO ;": 78,
        "LDSM.16.M88.4 R76, [R10] ;": 79,
        "LDSM.16.MT88.2 R76, [R10] ;": 77,
        "STSM.16.M88.4 [R3+0x400], R12 ;": 15,
        "STSM.16.M88 [R3], R12 ;": 12,
        "@P1 STG.E.64 desc[UR4][R90.64], R60 ;": 61,
        "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24 ;": 119,
        "HMMA.16816.F32.BF16 R24, R8, R12, R24 ;": 27,
        "EXIT ;": 0,
    }.items():
        assert aot._last_register(text) == last, text


def test_a_check_of_no_kernel_is_refused() -> None:
    script = Path(__file__).parents[1] / "scripts" / "check_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", "lightnig", "--no-model"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no case has 'lightnig'" in done.stderr
