"""The code for the CPU on a 64-bit Arm: it compiles, by Clang, which the package ziglang brings for any machine."""

import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
import native_build

pytestmark = pytest.mark.prove

ARM_64 = 183  # e_machine of an ELF file


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A compiler's command that is a single word."""
    folder = tmp_path_factory.mktemp("zig")
    options = ("--quiet", "--disable-pip-version-check", "--target", folder)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "ziglang==0.17.1"], check=True)
    command = folder / "c++"
    zig = shlex.join([sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"])
    command.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder))} exec {zig} "$@"\n')
    command.chmod(0o755)
    return command


def test_all_of_it_compiles_with_neon(compiler, tmp_path):
    plan = native_build.decide({"CXX": str(compiler), "CEIT_KERNELS_CUDA": "0", "PATH": os.environ["PATH"]})
    assert plan.kind == "cpu"
    (tmp_path / "build.ninja").write_text(native_build._ninja_file(plan, tmp_path, tmp_path / "_native.so"))
    objects = re.findall(r"^build (\S+\.o):", (tmp_path / "build.ninja").read_text(), re.MULTILINE)
    assert len(objects) == len(plan.sources), "each file once: there is one capability"
    ninja = [sys.executable, "-m", "ninja", "-C", str(tmp_path), *objects]
    done = subprocess.run(ninja, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    for path in objects:
        assert struct.unpack_from("<H", Path(path).read_bytes(), 18) == (ARM_64,), path
