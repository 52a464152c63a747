"""Compiled operators called with empty tensors: an error, or an empty result, but never the end of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import empty_operands

import ceit_kernels


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process for every call")
def test_no_compiled_operator_ends_the_process():
    environment = {**os.environ, "PYTHONPATH": str(Path(ceit_kernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, empty_operands.__file__]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr
    *died, tried = process.stdout.splitlines()
    assert died == []
    name, count = tried.split()
    if count == "0":
        pytest.skip("nothing is compiled here")
    assert (name, int(count) > 100) == ("tried", True)
