"""Installing with nvcc, with a C++ compiler alone, and with neither; and a wheel where there is no compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = ("nvcc", "nvcc.exe")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
PARTS = ("ceit", "ceit_kernels", "csrc", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler, which two of three need"),
]


@pytest.fixture
def source(tmp_path):
    """What a clone has, without anything compiled."""
    folder = tmp_path / "source"
    folder.mkdir()
    unwanted = shutil.ignore_patterns("_native*", "_build.json", "__pycache__")
    for part in PARTS:
        path = ROOT / part
        shutil.copytree(path, folder / part, ignore=unwanted) if path.is_dir() else shutil.copy(path, folder / part)
    return folder


def environment(folder, hidden):
    """This environment with a PATH on which the programs ``hidden`` are not."""
    programs = folder / "bin"
    programs.mkdir()
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(directory).glob("*"):
            link = programs / program.name
            if link.is_symlink():
                link.unlink()
            if program.name not in hidden:
                link.symlink_to(program)
    names = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CEIT_KERNELS_CUDA", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PATH": str(programs), "TORCH_CUDA_ARCH_LIST": "9.0"}


def pip(env, *arguments):
    options = ("--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    command = [sys.executable, "-m", "pip", *arguments[:1], *options, *map(str, arguments[1:])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr  # the latter has what the build says


def run_installed(site, env, code):
    """What a program prints that imports the installed package."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env={**env, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CHECK = """
import torch, ceit_kernels
from ceit_kernels import FusedLeFF, use_backend
leff, x = FusedLeFF(16, 64).eval(), torch.randn(2, 10, 16)
with torch.no_grad(), use_backend("reference"):
    expected = leff(x)
with torch.no_grad():
    torch.testing.assert_close(leff(x), expected)
print(ceit_kernels.__file__)
print(ceit_kernels.status())
"""


def rows(text):
    """Backends on the CPU by operator, from the table of ``status``."""
    cells = [line.split(maxsplit=3) for line in text.splitlines()]
    return {row[0]: row[2] for row in cells if len(row) == 4 and row[1] == "cpu"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_with_nvcc_the_cuda_kernels_are_built(source, tmp_path):
    env, site = environment(tmp_path, ()), tmp_path / "site"
    printed = pip(env, "install", "-v", "--target", site, source)
    assert "building CUDA kernels for 9.0" in printed
    assert "compiled in " in printed
    text = run_installed(site, env, CHECK)
    assert str(site) in text
    assert "the compiled extension is loaded: CUDA kernels for 9.0" in text
    assert rows(text)["leff"] == "native"


def test_without_a_compiler_it_is_pure_python_and_says_so(source, tmp_path):
    env, site = environment(tmp_path, (*NVCC, *COMPILERS)), tmp_path / "site"
    printed = pip(env, "install", "-v", "--target", site, source)
    assert "building pure Python" in printed
    text = run_installed(site, env, CHECK)
    assert "was not built: no C++ compiler was found" in text
    backends = rows(text)
    assert backends.pop("lca") == "native", "it is made of PyTorch's operators"
    assert set(backends.values()) == {"reference"}


def test_cuda_that_was_asked_for_and_cannot_be_built_is_an_error(source, tmp_path):
    env = {**environment(tmp_path, NVCC), "CEIT_KERNELS_CUDA": "1"}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", "site", source]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CEIT_KERNELS_CUDA=1, but nvcc was not found" in done.stdout + done.stderr


def test_with_a_compiler_alone_a_wheel_for_the_cpu_is_built_that_serves_every_python_and_needs_none(source, tmp_path):
    printed = pip(environment(tmp_path, NVCC), "wheel", "-v", "-w", tmp_path / "dist", source)
    assert "building C++ for the CPU" in printed
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    (bare := tmp_path / "bare").mkdir()
    env, site = environment(bare, (*NVCC, *COMPILERS)), tmp_path / "site"
    pip(env, "install", "--target", site, wheel)
    text = run_installed(site, env, CHECK)
    assert "the compiled extension is loaded: C++ for the CPU" in text
    assert "nvcc was not found" in text
    assert rows(text)["leff"] == "native"
    # The installed package, and not this one, passes the tests.
    shutil.copytree(ROOT / "tests", bare / "tests")
    names = (
        "leff/test_cpu.py",
        "linear",
        "attention/test_cpu.py",
        "attention/test_op.py",
        "attention/test_registration.py",
    )
    files = [f"tests/ceit_kernels/{name}" for name in names]
    options = ("-q", "-m", "not prove", "-p", "no:cacheprovider", "--import-mode=importlib")
    command = [sys.executable, "-m", "pytest", *options, *files]
    env["PYTHONPATH"] = f"{site}{os.pathsep}{bare / 'tests'}"
    done = subprocess.run(command, cwd=bare, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
