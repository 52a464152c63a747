import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.fused_modules import MODULES

import ceit_kernels
from ceit_kernels import BackendError, FusedLeFF, backends, fuse, use_backend
from ceit_kernels.operators import OPERATORS

CALLS = {name: lambda name=name: fused_call(name) for name in OPERATORS}


def fused_call(name):
    make, shape = MODULES[name]
    return fuse(make())(torch.randn(shape))


def test_a_setting_lasts_as_long_as_its_block_even_when_that_fails():
    with use_backend("reference"):
        with use_backend("lca=auto,leff=triton"):
            assert [backends.current_backend(name) for name in ("leff", "lca", "i2t")] == [
                "triton",
                "auto",
                "reference",
            ]
        assert backends.current_backend("lca") == "reference"
    with pytest.raises(ZeroDivisionError), use_backend("triton"):
        raise ZeroDivisionError
    assert backends.current_backend("lca") == "auto"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cuda", "backend: unknown backend 'cuda' in 'cuda', expected one of .*'reference'"),
        ("lca=fast", "unknown backend 'fast' in 'lca=fast'"),
        ("mlp=triton", "unknown operator 'mlp' in 'mlp=triton', expected one of .*'lca'"),
        ("", "unknown backend ''"),
    ],
)
def test_an_unknown_backend_or_operator_is_named(setting, message):
    with pytest.raises(ValueError, match=message), use_backend(setting):
        pass


# LCA's native backend needs nothing compiled.
@pytest.mark.parametrize(
    ("operator", "backend"), sorted(set(itertools.product(CALLS, ["native", "triton"])) - {("lca", "native")})
)
def test_a_backend_that_cannot_run_is_an_error_with_the_reason(monkeypatch, operator, backend):
    # Other tests give the stem kernels for CPU tensors.
    monkeypatch.setattr(backends, "has_kernel", lambda operator, device_type: False)
    reason = f"{operator} has no {backend} implementation"
    if backend in OPERATORS[operator].implementations:
        reason = "the compiled extension" if backend == "native" else "the tensor is on the CPU"
    message = f"{operator}: backend '{backend}' was asked for but cannot run: {reason}"
    with use_backend(f"{operator}={backend}"), pytest.raises(BackendError, match=message):
        CALLS[operator]()


@pytest.mark.parametrize("operator", CALLS)
def test_auto_and_reference_run_everywhere(operator):
    CALLS[operator]()
    with use_backend("reference"):
        CALLS[operator]()


def test_auto_says_why_it_chose():
    choice = backends.choose("leff", torch.zeros(1), torch.float16)
    assert choice.backend == "reference"
    assert choice.reason.startswith("triton: the tensor is on the CPU; native: the ")
    with use_backend("reference"):
        assert backends.choose("leff", torch.zeros(1), torch.float16) == ("reference", "asked for")


def test_auto_takes_triton_on_a_gpu_that_is_new_enough(monkeypatch):
    class OnGPU:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert backends.choose("lca", OnGPU(), torch.bfloat16) == ("triton", "the fastest that can run")
    assert backends.choose("lca", OnGPU(), torch.bfloat16, unsupported="too large").reason.startswith(
        "triton: too large"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with use_backend("auto"):
        choice = backends.choose("lca", OnGPU(), torch.bfloat16)
    assert choice.backend == "reference"
    assert choice.reason.startswith("triton: the GPU has compute capability 7.5, the kernels need 8.0; native: the ")
    with use_backend("triton"), pytest.raises(BackendError, match=r"compute capability 7\.5"):
        backends.choose("lca", OnGPU(), torch.bfloat16)


def test_auto_takes_triton_on_the_amd_chips_that_are_proven_and_others_only_when_asked(monkeypatch):
    class OnGPU:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.version, "hip", "6.4")
    for chip, backend in (("gfx942:sramecc+:xnack-", "triton"), ("gfx1030", "reference")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, c=chip: SimpleNamespace(gcnArchName=c))
        with use_backend("auto"):
            choice = backends.choose("lca", OnGPU(), torch.bfloat16)
        assert choice.backend == backend
        if backend == "reference":
            assert choice.reason.startswith("triton: the kernels are proven for AMD's gfx942")
            assert "and the GPU is gfx1030" in choice.reason
        with use_backend("triton"):
            assert backends.choose("lca", OnGPU(), torch.bfloat16) == ("triton", "asked for")


def test_a_setting_decides_once_for_calls_that_are_alike(monkeypatch):
    x = torch.zeros(1)
    first = backends.choose("add_norm", x, x.dtype)
    monkeypatch.setattr(backends, "has_kernel", lambda operator, device_type: False)
    assert backends.choose("add_norm", x, x.dtype) is first
    assert backends.choose("add_norm", x, x.dtype, unsupported="too large").backend == "reference"
    with use_backend("auto"):
        assert backends.choose("add_norm", x, x.dtype).backend == "reference"


def test_an_operator_without_an_implementation_is_left_to_plain_pytorch(monkeypatch):
    monkeypatch.setitem(OPERATORS, "leff", dataclasses.replace(OPERATORS["leff"], implementations={}))
    leff = FusedLeFF(16)
    with use_backend("leff=triton"), pytest.raises(BackendError, match="leff has no triton implementation"):
        leff(torch.randn(1, 5, 16))
    with use_backend("auto"):
        assert leff(torch.randn(1, 5, 16)).requires_grad


def test_every_operator_of_the_list_has_its_modules():
    assert set(OPERATORS) <= set(MODULES)
    for name, spec in OPERATORS.items():
        assert spec.name == name
        assert all(issubclass(fused, fused.plain_class) for fused in spec.fused_classes())
        assert spec.frozen is None or issubclass(spec.frozen_class(), spec.fused_classes()[0])


def test_a_dtype_that_the_kernels_lack_is_refused():
    with use_backend("triton"), pytest.raises(BackendError, match=r"not in torch\.float8_e4m3fn"):
        backends.choose("lca", torch.zeros(1), torch.float8_e4m3fn)


def test_status_has_a_row_for_every_operator_and_device_and_reads_as_a_table():
    rows = ceit_kernels.status()
    assert [(row.operator, row.device) for row in rows] == list(itertools.product(OPERATORS, ("cpu", "cuda")))
    assert all(row.reason for row in rows)
    assert {row.backend for row in rows if row.device == "cpu"} <= {"reference", "native"}
    lines = str(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[-1].startswith("the compiled extension")
    assert lines[0].split() == ["operator", "device", "backend", "why"]


def test_status_reports_a_setting_that_cannot_run():
    with use_backend("linear=triton"):
        row = next(row for row in ceit_kernels.status() if (row.operator, row.device) == ("linear", "cpu"))
    assert row.backend is None
    assert "linear has no triton implementation" in row.reason


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_sets_the_default():
    code = "from ceit_kernels import backends as b; print(b.current_backend('lca'), b.current_backend('leff'))"
    assert run_python(code, CEIT_KERNELS_BACKEND="lca=triton").stdout.split() == ["triton", "auto"]
    wrong = run_python(code, CEIT_KERNELS_BACKEND="fastest")
    assert wrong.returncode != 0
    assert "CEIT_KERNELS_BACKEND: unknown backend 'fastest'" in wrong.stderr


def test_without_triton_the_package_works_and_says_so():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, ceit_kernels
ceit_kernels.FusedLCAAttention(16)(torch.randn(1, 3, 16)).sum().backward()
with ceit_kernels.use_backend("lca=triton"):
    try:
        ceit_kernels.FusedLCAAttention(16)(torch.randn(1, 3, 16))
    except ceit_kernels.BackendError as error:
        print(error)
"""
    assert "triton is not installed" in run_python(code).stdout


def test_status_says_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "has_kernel", lambda operator, device_type: False)
    monkeypatch.setattr(backends, "extension_problem", lambda device_type: "it was not built: no nvcc")
    row = next(row for row in ceit_kernels.status() if (row.operator, row.device) == ("i2t", "cuda"))
    assert (row.backend, row.reason) == ("reference", "native: it was not built: no nvcc")


def test_the_package_imports_neither_pytorchs_compiler_nor_the_libraries_that_fuse_knows():
    """They take as long as PyTorch itself, in each process."""
    code = """
import sys, torch, ceit_kernels
names = ("torch._dynamo", "torch._inductor", "timm", "transformers", "torchvision")
print([name for name in names if name in sys.modules])
"""
    assert run_python(code).stdout.strip() == "[]"
