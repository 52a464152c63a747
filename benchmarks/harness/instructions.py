"""The instruction set of a run. A processor that has more can measure what one with less would do."""

import os

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from ceit.runtime.errors import UsageError
from ceit_kernels.common.extension import cpu_code

# What PyTorch, oneDNN (OpenVINO's too), MKL and this project read, at their first call.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CEIT_KERNELS_CPU")
_VALUES = {"baseline": ("default", "SSE41", "SSE4_2", "baseline"), "avx2": ("avx2", "AVX2", "AVX2", "avx2")}
INSTRUCTIONS = tuple(_VALUES)
# Implementations that always take the best that the processor has.
UNLIMITED = ("onnxruntime", "zentorch")


def limit_instructions(name: str) -> None:
    """Have everyone take no more than these instructions, one of `INSTRUCTIONS`, in this process and those it starts.

    Raises:
        UsageError: the processor lacks them, or too late, as something has computed already.
    """
    os.environ.update(zip(_VARIABLES, _VALUES[name], strict=True))
    chosen = {"PyTorch": torch.backends.cpu.get_cpu_capability().lower(), "ceit_kernels": cpu_code()}
    for library, found in chosen.items():
        if found not in (name, _VALUES[name][0]):
            raise UsageError(f"--instructions: expected {library} to run {name}, it runs {found}")
    # What a compiler prepacked for other instructions, oneDNN aborts at.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache_dir()}_{name}"


def instructions() -> str:
    """What the fused operators run on the CPU, and what PyTorch does where that differs."""
    ours, theirs = cpu_code() or "none", torch.backends.cpu.get_cpu_capability().lower()
    return ours if theirs in (ours.removesuffix("bf16"), "default") else f"{ours} (PyTorch {theirs})"


def exceeding() -> str | None:
    """Why `UNLIMITED` implementations are no rivals: the limit is below what the processor has. None if they are."""
    limit = os.environ.get("CEIT_KERNELS_CPU", "")
    has = "avx512" if torch.cpu._is_avx512_supported() else "avx2" if torch.cpu._is_avx2_supported() else "baseline"
    return f"it runs {has}, and the limit is {limit}" if limit in _VALUES and limit != has else None
