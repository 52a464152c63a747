"""Which of the compiled code a processor runs."""

import os
import subprocess
import sys

import pytest
import torch
from support.processors import KINDS

import ceit_kernels
from ceit_kernels.common import extension
from ceit_kernels.common.extension import cpu_code

# What PyTorch calls the instructions that the kinds of code need; it has a name for other machines' too.
_KIND_OF = {"AVX2": "avx2", "AVX512": "avx512"}


# What runs is chosen when the library is loaded, and loading PyTorch before takes seconds.
_ASK = """
import os, sys, torch
print(torch.backends.cpu.get_cpu_capability(), flush=True)
for kind in ("", *sys.argv[1:]):
    if os.fork() == 0:
        if kind:
            os.environ["CEIT_KERNELS_CPU"] = kind
        from ceit_kernels.common.extension import cpu_code
        print(cpu_code(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def asked():
    """What PyTorch finds in the processor where nothing restricts it, and what runs if none and each kind is named."""
    others = {k: v for k, v in os.environ.items() if k not in ("CEIT_KERNELS_CPU", "ATEN_CPU_CAPABILITY")}
    command = [sys.executable, "-c", _ASK, *KINDS]
    done = subprocess.run(command, env=others, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_best_that_the_processor_has_runs(asked):
    capability, best, *_ = asked
    bfloat16 = torch.cpu._is_avx512_bf16_supported()
    assert best == ("avx512bf16" if capability == "AVX512" and bfloat16 else _KIND_OF.get(capability, "baseline"))


def test_a_lesser_kind_runs_where_it_is_named_and_no_better_one_than_there_is(asked):
    _, best, *named = asked
    assert named == [min(kind, best, key=KINDS.index) for kind in KINDS]


def test_status_says_which_kind_runs():
    assert str(ceit_kernels.status()).endswith(f"the CPU runs its {cpu_code()} code")


def test_where_it_is_not_it_is_said_why(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
    why = extension._load.__wrapped__
    assert why() == "the compiled extension was not built: no record of the build"
    (tmp_path / "_build.json").write_text('{"reason": "no C++ compiler was found"}')
    assert why() == "the compiled extension was not built: no C++ compiler was found"
    (tmp_path / "_native.so").write_text("")
    assert why().startswith("the compiled extension does not load: ")


def test_registration_passes_pytorchs_own_checks():
    torch.library.opcheck(torch.ops.ceit._cpu_code, (), test_utils="test_schema")
