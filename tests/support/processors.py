"""Running code as a lesser processor would: the compiled code is chosen when a process starts."""

import os
import subprocess
import sys
from pathlib import Path

from ceit_kernels.common.extension import cpu_code

# What csrc/cpu is compiled for, on x86; each processor also runs what stands before its own.
KINDS = ("baseline", "avx2", "avx512", "avx512bf16")
# What runs in this process, all tests run; beside it, where that is told.
LESSER = KINDS[: KINDS.index(cpu_code())] if cpu_code() in KINDS else ()

_PREFACE = """
import sys
sys.path.insert(0, sys.argv[1])
from ceit_kernels.common.extension import cpu_code
print(cpu_code())
"""


def run_with(kind: str, code: str, *arguments: object) -> None:
    """Run Python code in a process whose compiled code is of a kind.

    Args:
        kind: one of ``LESSER``.
        code: finds the folder ``tests`` on its path, and the arguments as text in ``sys.argv[2:]``.
    """
    command = [sys.executable, "-c", _PREFACE + code, str(Path(__file__).parents[1]), *map(str, arguments)]
    environment = os.environ | {"CEIT_KERNELS_CPU": kind}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    ran = done.stdout.partition("\n")[0]
    assert done.returncode == 0, done.stderr
    assert ran == kind, "the library says which kind of its code runs"
