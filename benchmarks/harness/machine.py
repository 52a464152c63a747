"""What the numbers were taken on: versions, chip, threads, commit, and the ceilings of memory and arithmetic."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ceit_kernels
from ceit.runtime.machine import versions

from .implementations import PACKAGES, missing_packages
from .instructions import instructions

_ROOT = Path(__file__).parents[2]
# Bytes of the copied tensor and side of the multiplied matrices, by device.
_SIZES = {"cpu": (256 << 20, 2048), "cuda": (2 << 30, 8192)}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, chip, threads, commit and the backends of the fused operators, as JSON has them."""
    packages = {name: "not installed" if missing_packages(name) else version(name) for name in PACKAGES}
    return {
        "device": device.type,
        "chip": _chip(device),
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {**versions(), **packages},
        "commit": commit(),
        "backends": [asdict(row) for row in ceit_kernels.status() if row.device == device.type],
    }


def commit() -> str:
    """The checkout's commit, with "+ changes" where files differ from it; "unknown" without git."""
    try:
        name, changes = (
            subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} + changes" if changes else name


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The most that this machine reaches: bytes/s of a large copy, FLOP/s of a large matmul in a dtype.

    On the CPU the matmul is that of the fastest library that PyTorch carries: MKL and oneDNN differ by a factor of two
    where one does not know the chip.
    """
    size, side = _SIZES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmuls = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        matmuls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return {
        "bytes_per_second": 2 * size / _best(lambda: target.copy_(source), device),
        "flops_per_second": 2 * side**3 / min(_best(matmul, device) for matmul in matmuls),
    }


def _best(call: Callable[[], Any], device: torch.device, rounds: int = 15) -> float:
    """Seconds of the fastest call: a ceiling is what the machine can do."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _chip(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
