"""What the Triton compiler makes of a recorded launch for a chip, with no GPU present."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.cycles.sass import source
from ceit_kernels.backends import PROVEN_AMD_CHIPS
from ceit_kernels.common.launch import Launch, nvidia_options

# Shared memory that one program instance may use, in bytes, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
CHIPS = tuple(SHARED_MEMORY)
# Without one of two that get the same launches, PTX and registers, which the tests hold at the models' own shapes.
DISTINCT_CHIPS = tuple(chip for chip in CHIPS if chip != 86)
# For `parametrize`; the first in the quick tests too.
AMD_CHIPS = [pytest.param(chip, marks=[pytest.mark.prove] * (i > 0)) for i, chip in enumerate(PROVEN_AMD_CHIPS)]

# Disassembling takes as long as compiling, and the assembler takes these from PTX as they are (`assert_assembled`).
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_WIDE_LOAD = re.compile(
    r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)|\bcp\.async\.c[ag]\.shared\.global[^;]*, 0x10,|\bcp\.async\.bulk"
)
_ASSEMBLED_TENSOR_CORE = re.compile(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)\b")
_ASSEMBLED_WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\S*\.128\b|\bUTMALDG\b")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """What a chip would execute.

    Attributes:
        ptx: what the assembler is given.
        cubin: what it makes of that.
        shared_bytes: shared memory of a program instance.
        registers: registers of a thread.
        local_bytes: local memory of a thread, which is device memory: spilled registers.
        products: matrix products that the kernel asks for.
        tensor_core_instructions: instructions that carry them out.
        wide_loads: loads of 16 bytes a thread from device memory.
    """

    ptx: str
    cubin: bytes
    shared_bytes: int
    registers: int
    local_bytes: int
    products: int
    tensor_core_instructions: int
    wide_loads: int


def _compile(launch: Launch, target: GPUTarget, **options):
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source(launch), target=target, options=options)


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def compile_for_nvidia(launch: Launch, compute_capability: int) -> MachineCode:
    compiled = _compile(
        launch, GPUTarget("cuda", compute_capability, 32), **nvidia_options(launch.num_warps, launch.registers)
    )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(cubin, "-res-usage"))}
    return MachineCode(
        ptx=ptx,
        cubin=cubin,
        shared_bytes=compiled.metadata.shared,
        registers=usage["REG"],
        local_bytes=usage["LOCAL"] + usage["STACK"],
        products=len(re.findall(r"= tt\.dot ", compiled.asm["ttir"])),
        tensor_core_instructions=len(_TENSOR_CORE.findall(ptx)),
        wide_loads=len(_WIDE_LOAD.findall(ptx)),
    )


def assert_assembled(launch: Launch, chip: int) -> None:
    """Tensor cores and wide loads are in the machine code if PTX has them, and only then."""
    code = compile_for_nvidia(launch, chip)
    sass = _dump(code.cubin, "-sass")
    assert bool(_ASSEMBLED_TENSOR_CORE.search(sass)) is (code.tensor_core_instructions > 0), launch.kernel.__name__
    assert bool(_ASSEMBLED_WIDE_LOAD.search(sass)) is (code.wide_loads > 0), launch.kernel.__name__


def assert_alike(launches: list[Launch], others: list[Launch], chip: int, other: int) -> None:
    """The same launches on two chips, of which the compiler makes the same PTX but for the chip's name."""
    assert len(launches) == len(others)
    for each in zip(launches, others, strict=True):
        code, same = (compile_for_nvidia(*pair) for pair in zip(each, (chip, other), strict=True))
        name = each[0].kernel.__name__
        # The sources' paths follow, which are those of the checkout that filled the cache.
        instructions = [c.ptx.partition("\t.file\t")[0] for c in (code, same)]
        assert instructions[0].replace(f"sm_{chip}", "") == instructions[1].replace(f"sm_{other}", ""), name
        assert (code.registers, code.local_bytes) == (same.registers, same.local_bytes), name


def assert_reads_behind_tickets(ptx: str, tickets: int) -> None:
    """Partial results (loads that leave L1 out) are read behind a ticket: the stores of all threads, a barrier, the
    ticket of one, which publishes and acquires for the whole GPU, a barrier, the loads; and so for every ticket.
    """
    names = {
        "s": r"\bst\.global",
        "b": r"\bbar\.sync\s+0;",
        "t": r"\batom\.global\.acq_rel\.gpu\.add|\batom\.acq_rel\.gpu\.global\.add|\batom\.global\.gpu\.acq_rel\.add",
        "l": r"\bld\.global\S*\.cg\b",
    }
    pattern = "|".join(f"(?P<{name}>{expression})" for name, expression in names.items())
    order = "".join(str(match.lastgroup) for match in re.finditer(pattern, ptx))
    stores, *behind = order.split("t")
    assert len(behind) == tickets
    assert "l" not in stores
    for before, after in zip([stores, *behind], behind, strict=False):
        assert re.search("sb+$", before), order
        assert re.match("b+(s?)b*l", after), order


def assert_efficient(launch: Launch, chip: int, tensor_cores: bool = True, wide_loads: bool = True) -> None:
    """Nothing spilled, within the chip's shared memory, and products on tensor cores, unless they should not be."""
    code = compile_for_nvidia(launch, chip)
    assert code.products
    assert code.local_bytes == 0, f"{launch.kernel.__name__} spills registers to device memory"
    assert code.shared_bytes <= SHARED_MEMORY[chip]
    assert code.wide_loads or not wide_loads
    assert bool(code.tensor_core_instructions) is tensor_cores


def assert_unspilled(launch: Launch, chip: int) -> None:
    """For a kernel that streams: nothing spilled, and within the chip's shared memory."""
    code = compile_for_nvidia(launch, chip)
    assert code.local_bytes == 0, f"{launch.kernel.__name__} spills registers to device memory"
    assert code.shared_bytes <= SHARED_MEMORY[chip]


def compile_for_amd(launch: Launch, architecture: str) -> str:
    """The assembler text for an AMD chip."""
    return _compile(launch, GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)).asm["amdgcn"]
