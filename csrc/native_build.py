"""Compiles the extension: what can be built on this machine, why, and how. Used by setup.py, without importing PyTorch.

``decide`` is the one place that chooses. Sources in ``csrc/cuda`` need nvcc, those in ``csrc/cpu`` a C++ compiler
alone; with neither the package is pure Python. The code uses libtorch's stable ABI and no Python API, so one library
serves every Python from 3.10 and every PyTorch from 2.10 on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildError", "Plan", "build", "decide", "torch_root"]

CSRC = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
MINIMUM_NVCC = (12, 0)
# Code for 8.0 runs on 8.6 and 8.9; newer chips than 9.0 translate the PTX when they first load it.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
_TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_FLAGS = ["-std=c++17", "-O3", _TARGET_VERSION]
# A *_simd.cpp is compiled once for each of these that the target has; the best is chosen when the program runs.
_SIMD_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
_CAPABILITIES = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
_CAPABILITIES["avx512bf16"] = [*_CAPABILITIES["avx512"], "-mavx512bf16"]


class BuildError(Exception):
    """Something that was asked for cannot be built; the text is for the user."""


@dataclass(frozen=True)
class Plan:
    """What is built. ``kind`` is "cuda", "cpu" or "none", ``reason`` says why it is no more."""

    kind: str
    reason: str
    torch: Path | None = None
    compiler: str | None = None
    nvcc: str | None = None
    architectures: str = ""

    @property
    def sources(self) -> list[Path]:
        """The files to compile."""
        folders = {"cuda": ("cpu", "cuda"), "cpu": ("cpu",), "none": ()}[self.kind]
        found = [path for folder in folders for path in sorted((CSRC / folder).rglob("*"))]
        return [path for path in found if path.suffix in (".cpp", ".cu")]

    def describe(self) -> str:
        """One line for the user."""
        what = {
            "cuda": f"CUDA kernels for {self.architectures}, with {self.nvcc}",
            "cpu": f"C++ for the CPU, with {self.compiler}",
            "none": "pure Python, nothing compiled",
        }[self.kind]
        return f"{what} ({self.reason})" if self.reason else what


def torch_root() -> Path | None:
    """PyTorch's folder: where the build runs or, under pip's build isolation, where the package will be."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    roots = (Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib"))
    return next((root for root in roots if (root / "version.py").exists()), None)


def _torch_problem(root: Path | None) -> str | None:
    if root is None:
        return "PyTorch is not installed where the package is built"
    found = re.search(r"^__version__ *=.*?(\d+)\.(\d+)", (root / "version.py").read_text(), re.MULTILINE)
    if found and (int(found[1]), int(found[2])) < MINIMUM_TORCH:
        return f"PyTorch {found[1]}.{found[2]} is too old to compile for, 2.10 is needed"
    if not (root / "include" / "torch" / "csrc" / "stable").exists():
        return "PyTorch's headers are missing"
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def _find_compiler(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """A C++17 compiler, or why there is none."""
    names = [environ["CXX"].split()[0]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name, path=environ.get("PATH", "")))), None)
    if compiler is None:
        return None, f"no C++ compiler was found ({', '.join(names)})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <optional>\nstatic_assert(__cplusplus >= 201703L);\nstd::optional<int> probe;\n")
        probe = _run([compiler, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))])
    if probe.returncode:
        return None, f"{compiler} does not compile C++17: {_last_line(probe.stderr)}"
    return compiler, ""


def _find_nvcc(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """A CUDA compiler that can build and link, or why there is none. The compiler is asked, as it may be a wrapper."""
    homes = [Path(environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    named = [environ.get("CUDACXX"), *(str(path) for path in homes), "nvcc"]
    path = environ.get("PATH", "")
    nvcc = next((found for name in named if name and (found := shutil.which(name, path=path))), None)
    if nvcc is None:
        return None, "nvcc was not found"
    version = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]).stdout)
    if version is None:
        return None, f"{nvcc} does not answer to --version"
    if (int(version[1]), int(version[2])) < MINIMUM_NVCC:
        return None, f"{nvcc} is release {version[1]}.{version[2]}, 12.0 is needed"
    dry_run = _run([nvcc, "--dryrun", "-shared", "toolkit.cu", "-o", "toolkit.so"])
    libraries = re.findall(r'-L"?([^"\s]+)"?', "".join(re.findall(r"LIBRARIES=.*", dry_run.stderr)))
    if libraries and not any((Path(folder) / "libcudart_static.a").exists() for folder in libraries):
        return None, f"the toolkit of {nvcc} has no libcudart_static.a in {', '.join(libraries)}"
    return nvcc, ""


def _architectures(environ: Mapping[str, str]) -> str:
    """TORCH_CUDA_ARCH_LIST, else the GPUs of this machine, else a default."""
    if asked := environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return asked.replace(",", ";").replace(" ", ";")
    if shutil.which("nvidia-smi"):
        query = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        visible = {line.strip() for line in query.stdout.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())}
        supported = sorted(name for name in visible if float(name) >= 8.0)
        if query.returncode == 0 and supported:
            return ";".join(supported)
    return DEFAULT_ARCHITECTURES


def _architecture_flags(architectures: str) -> list[str]:
    flags = []
    for name in filter(None, architectures.split(";")):
        number, ptx, _ = name.partition("+PTX")
        if not re.fullmatch(r"\d+\.\d+a?", number):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {name!r}")
        if float(number.rstrip("a")) < 8.0:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0, got {number}")
        code = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return flags


def decide(environ: Mapping[str, str] = os.environ, assume_torch: bool = False) -> Plan:
    """What to build here: CUDA where nvcc is, whether or not a GPU is; else C++ for the CPU; else nothing.

    Args:
        environ: the environment's variables.
        assume_torch: as if a PyTorch with CUDA were installed.

    Raises:
        BuildError: CEIT_KERNELS_CUDA=1 asks for CUDA and it cannot be built, or a variable has no meaning.
    """
    cuda = environ.get("CEIT_KERNELS_CUDA", "")
    if cuda not in ("", "0", "1"):
        raise BuildError(f"CEIT_KERNELS_CUDA: expected 0 or 1, got {cuda!r}")
    root = torch_root()
    problem = None if assume_torch else _torch_problem(root)
    compiler = nvcc = None
    if problem is None:
        compiler, problem = _find_compiler(environ)
    if compiler is None:
        if cuda == "1":
            raise BuildError(f"CEIT_KERNELS_CUDA=1, but {problem}")
        return Plan("none", str(problem))
    if cuda == "0":
        problem = "CEIT_KERNELS_CUDA=0"
    elif root is not None and not list((root / "lib").glob("*torch_cuda*")):
        problem = "this PyTorch is built without CUDA"
    else:
        nvcc, problem = _find_nvcc(environ)
    if nvcc is not None:
        architectures = _architectures(environ)
        _architecture_flags(architectures)
        return Plan("cuda", "", root, compiler, nvcc, architectures)
    if cuda == "1":
        raise BuildError(f"CEIT_KERNELS_CUDA=1, but {problem}")
    return Plan("cpu", problem, root, compiler)


def _capabilities(compiler: str) -> dict[str, list[str]]:
    """By the machine that is compiled for; without flags GCC and Clang take SSE2 on x86, NEON on a 64-bit Arm."""
    target = _run([compiler, "-dumpmachine"]).stdout.strip() or platform.machine()
    if not target.lower().startswith(("x86_64", "amd64")):
        return {"baseline": []}
    # Compilers from before 2020 do not know the last.
    known = _run([compiler, "-mavx512bf16", "-fsyntax-only", "-x", "c++", os.devnull]).returncode == 0
    return {name: flags for name, flags in _CAPABILITIES.items() if known or name != "avx512bf16"}


def _ninja_file(plan: Plan, folder: Path, library: Path) -> str:
    capabilities = _capabilities(plan.compiler)
    flags = [*_FLAGS, *(f"-DCEIT_HAS_{name.upper()}" for name in capabilities)]
    libraries, linker = ["-ltorch_cpu", "-lc10"], [plan.compiler, "-shared"]
    dependencies = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
    rules = []
    if plan.kind == "cuda":
        flags += ["-DUSE_CUDA", f"-I{CSRC / 'cuda' / 'nvidia'}"]
        architectures = " ".join(_architecture_flags(plan.architectures))
        host = f"-ccbin {plan.compiler} -Xcompiler -fPIC,-fvisibility=hidden"
        rules.append(f"rule nvcc\n  command = {plan.nvcc} {' '.join(flags)} {architectures} {host} {dependencies}")
        linker = [plan.nvcc, "-shared", "-ccbin", plan.compiler]  # it knows where its runtime is
        libraries.insert(0, "-ltorch_cuda")
    host = f"-fPIC -fvisibility=hidden -isystem {plan.torch / 'include'}"
    rules.append(f"rule cxx\n  command = {plan.compiler} {' '.join(flags)} $extra {host} {dependencies}")
    linker += ["$in", "-o", "$out", f"-L{plan.torch / 'lib'}", *libraries]
    rules.append(f"rule link\n  command = {' '.join(map(str, linker))}\n")
    steps, objects = [], []

    def compile_with(rule: str, source: Path, name: str = "", extra: Sequence[str] = ()) -> None:
        objects.append(str(folder / f"{str(source.relative_to(CSRC)).replace('/', '_')}{name}.o"))
        steps.append(f"build {objects[-1]}: {rule} {source}\n  extra = {' '.join(extra)}\n")

    for source in plan.sources:
        if source.suffix == ".cu":
            compile_with("nvcc", source)
        elif source.stem.endswith("_simd"):
            for name, extra in capabilities.items():
                compile_with("cxx", source, f".{name}", [f"-DCEIT_CAPABILITY={name}", *_SIMD_FLAGS, *extra])
        else:
            compile_with("cxx", source)
    return "\n".join([*rules, *steps, f"build {library}: link {' '.join(objects)}", ""])


def build(plan: Plan, library: Path, folder: Path, environ: Mapping[str, str] = os.environ) -> float:
    """Compile a plan into a library; returns the seconds that it took.

    Args:
        library: the file to write.
        folder: for object files, which are reused.

    Raises:
        BuildError: ninja is missing or a file does not compile.
    """
    ninja = shutil.which("ninja") or _bundled_ninja()
    if ninja is None:
        raise BuildError("ninja was not found; `pip install ninja` provides it")
    folder, library = folder.resolve(), library.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(plan, folder, library))
    jobs = environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise BuildError(f"MAX_JOBS: expected a positive number, got {jobs!r}")
    start = time.perf_counter()
    done = _run([ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])])
    if done.returncode:
        output = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise BuildError("compiling failed:\n" + "\n".join(output[:20] or [done.stderr]))
    return time.perf_counter() - start


def _bundled_ninja() -> str | None:
    spec = importlib.util.find_spec("ninja")
    if spec is None or spec.origin is None:
        return None
    roots = (Path(spec.origin).parent / "data" / "bin", Path(sysconfig.get_path("scripts")))
    return next((str(root / "ninja") for root in roots if (root / "ninja").exists()), None)
