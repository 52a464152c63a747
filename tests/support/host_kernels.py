"""CUDA C++ compiled for the host over tests/simt, so that its kernels run where no GPU is."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC, SIMT = ROOT / "csrc", ROOT / "tests" / "simt"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
_CACHE = ROOT / ".cache" / "host_kernels"
_TORCH = Path(torch.__file__).parent
_FLAGS = ["-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE"]
_TORCH_FLAGS = ["-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(_TORCH / "include")]
_LIBRARIES = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def compile_on_host(name: str, *flags: str, libraries: tuple[str, ...] = (), csrc: Path = CSRC) -> Path:
    """A file of tests/simt, compiled; from the cache if neither the sources nor the flags have changed."""
    assert COMPILER, "the tests of compiled kernels need a C++ compiler"
    source = SIMT / name
    includes = [f"-I{folder}" for folder in (SIMT, csrc / "cuda", csrc)]
    command = [COMPILER, *_FLAGS, *includes, *flags, str(source)]
    contents = [path.read_bytes() for folder in (SIMT, csrc) for path in sorted(folder.rglob("*")) if path.is_file()]
    key = hashlib.sha256(b"\0".join([" ".join([*command, torch.__version__]).encode(), *contents])).hexdigest()[:16]
    _CACHE.mkdir(parents=True, exist_ok=True)
    target = _CACHE / f"{source.stem}_{key}"
    with (_CACHE / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            command += ["-o", str(partial), *libraries]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            partial.rename(target)
    return target


@functools.cache
def load_stem_kernels() -> ctypes.CDLL:
    """Register the stem's kernels for CPU tensors; ``ceit_set_schedule(seed)`` orders the threads of later launches."""
    path = compile_on_host("i2t.cpp", "-O2", *_TORCH_FLAGS, libraries=tuple(_LIBRARIES))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))
