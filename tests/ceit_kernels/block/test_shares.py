"""How evenly the work on one image is shared among more threads than this machine may have."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SOURCE = Path(__file__).parents[2] / "support" / "shares.cpp"
INFER = """
import ctypes, sys, torch, ceit, ceit_kernels
shares = ctypes.CDLL(sys.argv[1]).shares
shares.argtypes, shares.restype = [ctypes.c_int64], ctypes.c_double
model, x = ceit_kernels.freeze(ceit.create_model(sys.argv[2]).eval()), torch.randn(1, 3, 224, 224)
with torch.no_grad():
    model(x)
    for threads in 4, 8, 16:
        shares(threads)
        model(x)
        print(shares(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize("size", ["tiny", pytest.param("small", marks=pytest.mark.prove)])
def test_no_thread_has_much_more_of_an_image_than_the_others(size, tmp_path):
    assert COMPILER, "the tests of compiled kernels need a C++ compiler"
    library = tmp_path / "shares.so"
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INFER, str(library), f"ceit_{size}_patch16_224"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 3, done.stderr
    assert max(ratios) <= 1.15, ratios
