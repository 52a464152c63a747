"""The machine code of a launch: instructions with what the assembler says of their timing."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ceit_kernels.common.launch import Launch, nvidia_options

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")

# Opcodes by the unit that executes them; what is not named is issued and no more.
_UNITS = {
    "fma": "FFMA FMUL FADD",
    "half": "HFMA2 HADD2 HMUL2 IMAD",
    "alu": "IADD3 LOP3 LEA SHF PRMT SEL ISETP FSETP FMNMX IMNMX VIADD VIMNMX MOV F2FP FSEL PLOP3 IABS VIADDMNMX FMNMX3 "
    "LOP IADD BMSK SGXT P2R R2P VOTE CS2R FCHK FSWZADD I2FP F2IP HSETP2 HMNMX2",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "load": "LDG",
    "copy": "LDGSTS",
    "store": "STG RED",
    "ticket": "ATOMG",
    "shared load": "LDS LDSM SHFL",
    "shared store": "STS STSM",
    "tensor": "HMMA",
    "warpgroup": "HGMMA",
    "constant": "LDC LDCU S2R S2UR R2UR",
    "commit": "LDGDEPBAR",
    "wait for copies": "DEPBAR",
    "barrier": "BAR",
    "branch": "BRA CALL",
    "exit": "EXIT",
}
_UNIT_OF = {opcode: unit for unit, opcodes in _UNITS.items() for opcode in opcodes.split()}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(slots=True)
class Instruction:
    """An instruction.

    Attributes:
        unit: what executes it.
        predicated: whether it depends on a predicate.
        width: bytes a thread that it moves.
        count: columns of a warpgroup's product, or groups that a wait leaves in flight.
        ends_group, from_shared: of a warpgroup's product, whether it ends a group, and takes both sides from shared
            memory.
        target: of a branch, the index that it goes to.
        stall: cycles to the warp's next instruction.
        sets, frees: the scoreboards that its result, and the reading of its operands, release; 7 for none.
        waits: the scoreboards that it waits for, as bits.
    """

    unit: str
    predicated: bool
    width: int = 0
    count: int = 0
    ends_group: bool = False
    from_shared: bool = False
    target: int | None = None
    stall: int = 1
    sets: int = 7
    frees: int = 7
    waits: int = 0


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and what a program instance of it holds: registers a thread, bytes of shared memory."""

    instructions: list[Instruction]
    registers: int
    shared_bytes: int
    spilled_bytes: int


def source(launch: Launch) -> ASTSource:
    """Types and known divisors of the arguments, as Triton's launcher would specialise them."""
    constant_names = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value, specialized = launch.arguments[name], not launch.kernel.params[i].do_not_specialize
        if name in constant_names or value is None or (isinstance(value, int) and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[name], divisible = launch.kernel.params[i].annotation_type or "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialized and value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, chip: int = 90) -> Code:
    """The machine code of a recorded launch."""
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **nvidia_options(launch.num_warps, launch.registers),
    }
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, text = (
            subprocess.run([_BIN / tool, *flags, cubin.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-hex", "-c"))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(parse(text), used["REG"], compiled.metadata.shared, used["LOCAL"] + used["STACK"])


def parse(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's output with ``-hex``."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[Instruction, str]] = []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _LINE.match(line):
            found.append(_instruction(match[2], match[1] is not None))
            if found[-1].unit == "branch" and (target := re.search(r"`\((\.L_x_\d+)\)", match[2])):
                branches.append((found[-1], target[1]))
        elif (match := _CONTROL.match(line)) and found:
            word, last = int(match[1], 16), found[-1]
            last.stall, last.sets, last.frees = word >> 41 & 15, word >> 46 & 7, word >> 49 & 7
            last.waits = word >> 52 & 63
    for branch, label in branches:
        branch.target = labels.get(label)
    return found


def _instruction(text: str, predicated: bool) -> Instruction:
    opcode, *modifiers = text.split()[0].split(".")
    unit = _UNIT_OF.get(opcode, "uniform" if opcode.startswith("U") else "other")
    instruction = Instruction(unit, predicated)
    if opcode in ("LDSM", "STSM"):
        instruction.width = 16 if "4" in modifiers else 8 if "2" in modifiers else 4
    elif opcode == "SHFL":
        instruction.width = 4
    elif unit in ("load", "copy", "store", "shared load", "shared store"):
        instruction.width = next((bytes for name, bytes in _WIDTHS.items() if name in modifiers), 4)
    elif unit == "warpgroup":
        shape = re.search(r"64x(\d+)x16", text)
        instruction.count = int(shape[1]) if shape else 64
        instruction.ends_group = "gsb0" in text
        instruction.from_shared = "gdesc" in text.split(",")[1]
    elif opcode == "WARPGROUP" and "DEPBAR" in modifiers:
        instruction.unit, instruction.count = "wait for products", _hex(r"gsb0, (0x[0-9a-f]+)", text)
    elif unit == "wait for copies":
        instruction.count = _hex(r"SB0, (0x[0-9a-f]+)", text)
    elif unit == "barrier" and "ARV" in modifiers and "SYNC" not in modifiers:
        instruction.unit = "other"
    return instruction


def _hex(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1], 16) if match else 0


def loops(instructions: list[Instruction]) -> list[int]:
    """The indices of the branches back of all loops but those that wait for something, and those behind a ticket."""
    end = next((k for k, i in enumerate(instructions) if i.unit == "ticket"), len(instructions))
    found = enumerate(instructions[:end])
    return [k for k, i in found if i.unit == "branch" and i.target is not None and k - i.target > 20]


def trace(instructions: list[Instruction], runs: dict[int, int], start: int = 0) -> list[Instruction]:
    """What a warp executes from an instruction on where the loops of these branches run so often, and no branch ahead
    is taken under a predicate, but the first behind a ticket: few warps have the last one.
    """
    executed, left, k, ends = [], {}, start, False
    while k < len(instructions):
        i = instructions[k]
        executed.append(i)
        ends |= i.unit == "ticket"
        if i.unit == "exit" and (ends or not i.predicated):
            break
        if i.unit == "branch" and i.target is not None:
            if i.target <= k:
                left[k] = left.get(k, runs.get(k, 1)) - 1
                if left[k] > 0:
                    k = i.target
                    continue
                del left[k]
            elif ends or not i.predicated:
                k = i.target
                continue
        k += 1
    return executed


def forked(instructions: list[Instruction], runs: dict[int, int]) -> tuple[list[Instruction], list[Instruction]]:
    """What warps of the two ways execute that the first long branch ahead under a predicate parts."""
    fork, target = next(
        (k, i.target)
        for k, i in enumerate(instructions)
        if i.unit == "branch" and i.predicated and i.target is not None and i.target - k > 100
    )
    return trace(instructions[:target], runs), instructions[: fork + 1] + trace(instructions, runs, target)
