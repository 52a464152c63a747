"""What nvcc makes of the stem's kernels: no spills, tensor cores, wide loads and stores, room for a second block."""

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from support.host_kernels import CSRC

CHIPS = (80, 86, 89, 90, 100, 120)
FILES = ("bf16", "fp16", "float32")
NVCC = shutil.which("nvcc")
QUICK = ("bf16", 90)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@dataclass
class Kernel:
    name: str
    code: str
    spilled: int
    registers: int

    @property
    def is_scalar(self):
        return "ScalarMma" in self.name


def compile_kernels(folder, file, chip) -> list[Kernel]:
    cuobjdump = pytest.importorskip("support.machine_code")._CUOBJDUMP
    cubin = folder / f"{file}.cubin"
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{chip}", "-Xptxas", "-v", "-cubin", "-o", cubin]
    command.append(f"-I{CSRC / 'cuda' / 'nvidia'}")
    done = subprocess.run([*command, CSRC / "cuda" / "i2t" / f"{file}.cu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = {}
    for name, usage in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?registers.*?)\n", done.stderr, re.DOTALL):
        spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", usage)))
        used[name] = spilled, int(re.search(r"Used (\d+) registers", usage)[1])
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", sass)[1:]
    return [Kernel(name, code, *used[name]) for name, code in zip(parts[::2], parts[1::2], strict=True)]


def is_product(kernel):
    return re.search(r"\d+(forward_kernel|weight_gradient_kernel|image_gradient_kernel)I", kernel.name)


@pytest.mark.parametrize(
    ("file", "chip"),
    [
        pytest.param(file, chip, marks=[] if (file, chip) == QUICK else pytest.mark.prove)
        for file in FILES
        for chip in CHIPS
    ],
)
def test_machine_code(tmp_path, file, chip):
    kernels = compile_kernels(tmp_path, file, chip)
    products = [kernel for kernel in kernels if is_product(kernel)]
    assert len(products) >= 10
    for kernel in kernels:
        assert kernel.spilled == 0, kernel.name
        assert not re.search(r"\b(?:LDL|STL)\b", kernel.code), f"{kernel.name} uses local memory"
    for kernel in products:
        # The image's gradient takes no product where the statistics are given.
        multiplies = not ("image_gradient" in kernel.name and "Lb0E" in kernel.name)
        assert bool(re.search(r"\bHMMA\b", kernel.code)) is (multiplies and not kernel.is_scalar), kernel.name
        if multiplies:
            assert re.search(r"\bSTS\.128\b", kernel.code), f"{kernel.name} stores the image in small pieces"
            assert re.search(r"\bLDG\.E\.128\b", kernel.code), f"{kernel.name} loads the image in small pieces"
        if "HalfMma" in kernel.name and "forward_kernel" in kernel.name:
            assert kernel.registers <= 128, f"{kernel.name} leaves no room for a second block of 256 threads"
