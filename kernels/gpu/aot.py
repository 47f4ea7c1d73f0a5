"""Compiles kernels for Hopper on a machine without a GPU, and reads what came out.

Triton's: registers and local memory are from `cuobjdump -res-usage`, instructions from `nvdisasm`; both come with
triton. Mosaic's: what its compiler writes to a folder.
"""

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax.extend.core import jaxprs_in_params

from m1jax.kernels.gpu.target import HOPPER

SHARED_MEMORY = 232_448  # bytes a program may have on an H100 or H200
PROGRAM_COUNTER = 2  # registers of each thread that no code may use


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as JAX would call it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # parameter, Triton type
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel."""

    name: str
    registers: int
    spills: int  # loads from and stores to local memory in the code
    shared: int  # bytes
    hgmma: int  # warp-group matrix instructions in the code
    sass: str
    warnings: str = ""  # of the assembler, on speed

    def faults(self, matmul: bool) -> list[str]:
        """Why this kernel must not be used."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_MEMORY:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY} is the limit")
        if matmul and not self.hgmma:
            found.append("no HGMMA")
        if self.warnings:
            found.append(self.warnings)
        return found + self.crowded

    @property
    def crowded(self) -> list[str]:
        """Warp groups whose code uses more registers than they keep, in the order of the text: an illegal instruction.

        Two registers of a thread hold its program counter: of 72 kept, an H200 met an illegal instruction where code
        wrote the 71st, right after the 70th.
        """
        found = []
        for change, code in _warp_groups(self.sass.splitlines()):
            kept = re.search(r"USETMAXREG\S+ (?:UP\d+, )?0x([0-9a-f]+)", change)
            if kept is None:
                raise RuntimeError(f"cannot read {change}")
            used = 1 + max(map(_last_register, code), default=0)
            if used > (usable := int(kept[1], 16) - PROGRAM_COUNTER):
                found.append(f"a warp group uses {used} registers of the {usable} that it keeps")
        return found


def _warp_groups(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each change of a warp group's registers, and the instructions that can come after it.

    What surely leads to another change belongs to another group, which is sent there before it changes its own.

    Raises:
      RuntimeError: there are jumps whose ends the text does not tell.
    """
    changes = [i for i, line in enumerate(lines) if "USETMAXREG" in line]
    if changes and (odd := re.search(r"\b(?:CALL|BRX|JMX|JMP|BSYNC|BREAK)\b[^;]*", "\n".join(lines))):
        raise RuntimeError(f"cannot follow {odd[0]}")
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w*:", line.strip())}
    end = len(lines)  # where programs go that end
    following = []
    for i, line in enumerate(lines):
        after = [labels[name] for name in re.findall(r"\.L\w*", line) if labels.get(name, i) != i]
        conditional = re.search(r"@!?U?P\d", line)
        if exits := re.search(r"\b(?:EXIT|RET)\b", line):
            after.append(end)
        if conditional or not (exits or re.search(r"\bBRA `", line)):
            after.append(i + 1)
        following.append(after)
    elsewhere = set(changes)
    while more := {i for i, after in enumerate(following) if after and elsewhere.issuperset(after)} - elsewhere:
        elsewhere |= more
    for change in changes:
        ahead, code = list(following[change]), set()
        while ahead:
            i = ahead.pop()
            if i < end and i not in code and i not in elsewhere:
                code.add(i)
                ahead += following[i]
        yield lines[change], [lines[i] for i in sorted(code)]


def _last_register(instruction: str) -> int:
    """The highest register of an instruction; of several in a row it names the first."""
    code = re.sub(r"\[[^]]*\]", "", instruction)  # an address is one register or two, and computed by others
    more = _in_a_row(code) - 1
    return max((int(number) + more for number in re.findall(r"\bR(\d+)\b", code)), default=0)


def _in_a_row(code: str) -> int:
    """The most registers that an operand stands for."""
    if sums := re.search(r"HGMMA\.64x(\d+)x\d+\.F32", code):
        return int(sums[1]) // 2
    if bits := re.search(r"\.(64|128)\b", code):
        return int(bits[1]) // 32
    if re.search(r"\bHMMA\b", code):
        return 4
    if matrices := re.search(r"\b(?:LDSM|STSM)\S*\.([24])\b", code):
        return int(matrices[1])
    return 2 if re.search(r"\bCS2R |\.WIDE\b", code) else 1


def launches(jaxpr: Any) -> Iterator[Launch]:
    """Every Triton kernel called in a jaxpr, in inner jaxprs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "triton_kernel_call":
            yield _launch(eqn)
        for inner in jaxprs_in_params(eqn.params):
            yield from launches(inner)


def _launch(eqn: Any) -> Launch:
    from jax_triton.triton_lib import get_triton_type

    kernel, scalars = eqn.params["fn"], eqn.params["scalar_args"]
    types = [get_triton_type(v.aval) for v in eqn.invars]
    for index, kind, _ in scalars:
        types.insert(index, kind)
    types += [get_triton_type(v.aval) for v in eqn.outvars]
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False))
    constants = {name: eqn.params[name] for name in names if name in eqn.params}
    constants.update({names[index]: 1 for index, _, value in scalars if value == 1})  # jax-triton does so, too
    signature.update(dict.fromkeys(constants, "constexpr"))
    ordered = tuple((name, signature[name]) for name in names)
    return Launch(kernel, ordered, tuple(constants.items()), eqn.params["num_warps"], eqn.params["num_stages"])


def compiled(launch: Launch) -> Report:
    """Compiles for Hopper as jax-triton does: pointers aligned to 16 bytes, multiplications and additions fused."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(launch.signature) if kind[0] == "*"}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    return _report(launch.kernel.fn.__name__, binary.asm["cubin"], binary.metadata.shared)


@contextmanager
def mosaic_dumps() -> Iterator[Path]:
    """A folder to which Mosaic's compiler writes for so long, the machine code by triton's disassembler."""
    import jax.experimental.mosaic.gpu  # noqa: F401, which sets the first variable
    from triton import knobs

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(Path(knobs.nvidia.nvdisasm.path).parents[1])
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        try:
            yield Path(folder)
        finally:
            for name in ("MOSAIC_GPU_CUDA_ROOT", "MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTXAS"):
                os.environ.pop(name)
            os.environ |= before


def mosaic_reports(name: str, folder: Path) -> list[Report]:
    """Of the kernels that a compilation left in the folder, which is emptied."""
    kernels: dict[str, dict[str, str]] = {}
    for file in sorted(folder.iterdir()):
        kernels.setdefault(file.name.split(".")[0], {})[file.suffix] = file.read_text()
        file.unlink()
    found = []
    for texts in kernels.values():
        if not {".sass_ctrl", ".ptxas", ".txt"} <= set(texts):
            continue
        registers = re.search(r"Used (\d+) registers", texts[".ptxas"])
        shared = re.search(r"smem_scratch_bytes=(\d+)", texts[".txt"])
        if not (registers and shared):
            raise RuntimeError(f"Mosaic's compiler names no registers or memory: {texts['.ptxas']} {texts['.txt']}")
        slow = re.search(r"Potential Performance Loss: [^\n]*", texts[".ptxas"])
        numbers = int(registers[1]), int(shared[1])
        found.append(_counted(name, *numbers, texts[".sass_ctrl"], slow[0] if slow else ""))
    return found


def _report(name: str, cubin: bytes, shared: int) -> Report:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.search(r"REG:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump names no registers:\n{usage}")
    return _counted(name, int(found[1]), shared, sass)


def _counted(name: str, registers: int, shared: int, sass: str, warnings: str = "") -> Report:
    spills, hgmma = (len(re.findall(rf"\b(?:{word})\b", sass)) for word in ("LDL|STL", "HGMMA"))
    return Report(name, registers, spills, shared, hgmma, sass, warnings)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
