"""Which of the compiled code a processor runs."""

import os
import subprocess
import sys

import pytest
import torch
from support.processors import KINDS

import ceit_kernels
from ceit_kernels.common.extension import cpu_code

# What PyTorch calls the instructions that the kinds of code need; it has a name for other machines' too.
_KIND_OF = {"AVX2": "avx2", "AVX512": "avx512"}


def ask(code, **environment):
    """What a process prints in whose environment nothing else restricts the processor."""
    others = {k: v for k, v in os.environ.items() if k not in ("CEIT_KERNELS_CPU", "ATEN_CPU_CAPABILITY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=others | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK_KIND = "from ceit_kernels.common.extension import cpu_code; print(cpu_code())"


@pytest.fixture(scope="module")
def best():
    """The kind that runs where none is named, and what PyTorch finds in the same processor."""
    return ask(f"{ASK_KIND}\nimport torch; print(torch.backends.cpu.get_cpu_capability())").split()


def test_the_best_that_the_processor_has_runs(best):
    kind, capability = best
    assert kind == _KIND_OF.get(capability, "baseline")


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_a_lesser_kind_runs_where_it_is_named_and_no_better_one_than_there_is(best, kind):
    assert ask(ASK_KIND, CEIT_KERNELS_CPU=kind) == min(kind, best[0], key=KINDS.index)


def test_status_says_which_kind_runs():
    assert str(ceit_kernels.status()).endswith(f"the CPU runs its {cpu_code()} code")


def test_registration_passes_pytorchs_own_checks():
    torch.library.opcheck(torch.ops.ceit._cpu_code, (), test_utils="test_schema")
