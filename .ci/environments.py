"""Runs a quick selection of the tests with the oldest and the newest of what the project promises to work with.

Beside them it runs the operators' tests with each lesser kind of compiled code (`tests/run.py kinds`), as one of these
parts alone would leave a core idle. `environments.py prepare` only makes the environments.

Each set of versions gets a virtual environment in `.cache/environments`, kept for the next time. The compiled library
is the one of the checkout: it is built against libtorch's stable ABI, and so serves all of them.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from run import PYTEST, Part, parts_by_kind, report  # noqa: E402

FOLDER = ROOT / ".cache" / "environments"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# By name: versions of Python, the one that is meant first, and the file of the others; the newest are what pip finds.
ENVIRONMENTS = {"oldest": (PYTHONS, ROOT / ".ci" / "oldest.txt"), "newest": (PYTHONS[::-1], None)}
# What another version of Python, PyTorch, timm or transformers is likely to break: registration, compilation, export,
# modules, models and checkpoints; and that the compiled library computes.
QUICK = (
    "tests/ceit_kernels/test_backends.py",
    "tests/ceit_kernels/test_fuse.py",
    "tests/ceit_kernels/adapters",
    "tests/ceit_kernels/common",
    "tests/ceit_kernels/block",
    "tests/ceit_kernels/convnet",
    "tests/ceit_kernels/linear",
    "tests/ceit_kernels/add_norm/test_cpu.py",
    "tests/ceit_kernels/attention",
    "tests/ceit_kernels/lca/test_cpu.py",
    "tests/ceit_kernels/lca/test_registration.py",
    "tests/ceit_kernels/leff/test_functional.py",
    "tests/ceit_kernels/leff/test_module.py",
    "tests/ceit_kernels/leff/test_registration.py",
    "tests/ceit_kernels/i2t/test_module.py",
    "tests/ceit_kernels/i2t/test_cpu_registration.py",
    "tests/ceit/test_blocks.py",
    "tests/ceit/test_checkpoint.py",
    "tests/ceit/test_layers.py",
    "tests/ceit/test_model.py",
    "tests/ceit/test_registry.py",
    "tests/ceit/test_timm_contract.py",
)


# The oldest Triton that the project promises to work with. A bare copy of it compiles for GPUs beside any PyTorch.
TRITON = "3.6.0"
MACHINE_CODE = (
    *(f"tests/ceit_kernels/{operator}/test_machine_code.py" for operator in ("leff", "lca", "add_norm")),
    "tests/ceit_kernels/leff/test_training_machine_code.py",
)


def find_python(version: str) -> str | None:
    """An interpreter of a version, on PATH or of pyenv."""
    root = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(glob.glob(f"{root}/versions/{version}.*/bin/python"))]
    question = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, candidates):
        done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return python
    return None


def choose_python(name: str, versions: Sequence[str]) -> str:
    """The first of some versions that is there; where that is not the first of them, it is said."""
    found = next(((version, python) for version in versions if (python := find_python(version))), None)
    if found is None:
        sys.exit(f"{name}: expected one of Python {', '.join(versions)} on PATH or of pyenv, found none")
    if found[0] != versions[0]:
        print(f"{name}: there is no Python {versions[0]} on this machine; it runs with {found[0]}.", flush=True)
    return found[1]


def requirements(extra: str) -> list[str]:
    """What an extra of the installed project asks for, the project's own extras resolved."""
    found = []
    for line in metadata.requires("ceit-kernels") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        own = re.fullmatch(r"ceit-kernels\[(\w+)\]", requirement)
        if marker and f'extra == "{extra}"' not in marker.replace("'", '"'):
            continue
        found += requirements(own[1]) if own else [requirement]
    return list(dict.fromkeys(found))


def prepare(name: str, python: str, constraints: Path | None) -> str:
    """Make an environment, or bring it up to date; returns its interpreter."""
    folder = FOLDER / name
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = str(folder / "bin" / "python")
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--upgrade",
        *(["-c", str(constraints)] if constraints else []),
    ]
    subprocess.run([inside, "-m", "pip", "install", *options, *requirements("test")], check=True)
    versions = "import platform as p, torch, timm; print(p.python_version(), torch.__version__, timm.__version__)"
    print(f"{name}: Python, torch and timm are", end=" ", flush=True)
    subprocess.run([inside, "-c", versions], check=True)
    return inside


def older_triton() -> Part:
    """The quick tests of machine code with the oldest Triton, which it installs beside the present one."""
    folder = FOLDER / f"triton-{TRITON}"
    options = ["--quiet", "--disable-pip-version-check", "--upgrade", "--no-deps", "--target", str(folder)]
    if not (folder / "triton").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", *options, f"triton=={TRITON}"], check=True)
    return Part(f"machine code, Triton {TRITON}", (*PYTEST, *MACHINE_CODE), {"PYTHONPATH": str(folder)})


def main(arguments: Sequence[str]) -> int:
    """Prepare the environments one after the other, then run all parts side by side; returns the exit status."""
    parts = [older_triton()]
    for name, (versions, constraints) in ENVIRONMENTS.items():
        python = prepare(name, choose_python(name, versions), constraints)
        parts.append(Part(f"quick, {name} versions", (*PYTEST, *QUICK), program=python))
    return 0 if "prepare" in arguments else report([*parts_by_kind(), *parts])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
