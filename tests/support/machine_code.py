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
# For `parametrize`; the first in the quick tests too.
AMD_CHIPS = [pytest.param(chip, marks=[pytest.mark.prove] * (i > 0)) for i, chip in enumerate(PROVEN_AMD_CHIPS)]

_TENSOR_CORE = re.compile(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)\b")
_WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\S*\.128\b|\bUTMALDG\b")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """What a chip would execute.

    Attributes:
        shared_bytes: shared memory of a program instance.
        registers: registers of a thread.
        local_bytes: local memory of a thread, which is device memory: spilled registers.
        products: matrix products that the kernel asks for.
        tensor_core_instructions: instructions that carry them out.
        wide_loads: loads of 16 bytes a thread from device memory.
    """

    shared_bytes: int
    registers: int
    local_bytes: int
    products: int
    tensor_core_instructions: int
    wide_loads: int


def _compile(launch: Launch, target: GPUTarget, **options):
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source(launch), target=target, options=options)


def compile_for_nvidia(launch: Launch, compute_capability: int) -> MachineCode:
    compiled = _compile(launch, GPUTarget("cuda", compute_capability, 32), **nvidia_options(launch.num_warps))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = [subprocess.run([_CUOBJDUMP, option, cubin.name], capture_output=True, text=True, check=True).stdout
                for option in ("-res-usage", "-sass")]  # fmt: skip
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump[0])}
    return MachineCode(
        shared_bytes=compiled.metadata.shared,
        registers=usage["REG"],
        local_bytes=usage["LOCAL"] + usage["STACK"],
        products=len(re.findall(r"= tt\.dot ", compiled.asm["ttir"])),
        tensor_core_instructions=len(_TENSOR_CORE.findall(dump[1])),
        wide_loads=len(_WIDE_LOAD.findall(dump[1])),
    )


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
