"""What a launch is for: which GPU, in which precision, by which options; on GPUs that are not there."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from ceit_kernels import use_backend
from ceit_kernels.common import plan
from ceit_kernels.common.launch import (
    compute_capability,
    is_recording,
    nvidia_options,
    record_launches,
    target_chip,
    target_device,
)
from ceit_kernels.graphs import graph_settings
from ceit_kernels.i2t import cuda

ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), shape=(1,))


@pytest.fixture
def two_gpus(monkeypatch):
    """A GeForce, which is the current one, and an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 6), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_a_chip_is_that_of_the_tensors_or_of_the_record(two_gpus, monkeypatch):
    x = torch.empty(1)
    assert (target_device(x), target_chip(x)) == (("cpu", None), 90)
    assert (target_device(ON_GPU), target_chip(ON_GPU)) == (("cuda", 1), 90)
    assert compute_capability(0) == 86
    with record_launches(120):
        with record_launches():
            assert compute_capability(0) == target_chip(x) == 90
        assert compute_capability(0) == target_chip(x) == target_chip(ON_GPU) == 120
        assert target_device(x) == target_device(ON_GPU) == ("cuda", None)
        assert is_recording()
    assert not is_recording()
    assert compute_capability(0) == 86
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert compute_capability(0) == 90


def test_threads_may_have_all_registers_that_a_chip_has_for_them(monkeypatch):
    assert [nvidia_options(warps, 255) for warps in (1, 8, 16)] == [{"maxnreg": 255}, {"maxnreg": 255}, {}]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert nvidia_options(4, 255) == {}


def test_launches_go_to_the_device_of_the_tensors(two_gpus, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for x in (torch.empty(1), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), ON_GPU):
        with plan._on_device_of(x):
            pass
    assert entered == [ON_GPU.device]


@pytest.mark.parametrize(("images", "rows"), [(1, 4), (32, 12), (256, 56)])
def test_blocks_of_the_stem_take_all_rows_where_there_are_images_enough(monkeypatch, images, rows):
    monkeypatch.setattr(cuda, "_multiprocessors", lambda x: 132)
    assert cuda._rows_per_block(torch.empty(images, 3, 224, 224, device="meta"), 56, 56) == rows


@contextmanager
def in_precision(backend, precision):
    before, backend.fp32_precision = backend.fp32_precision, precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def test_the_stem_multiplies_by_tensor_cores_where_convolutions_do():
    assert [cuda._tensor_cores(dtype) for dtype in (torch.float16, torch.bfloat16)] == [True, True]
    for precision in ("tf32", "ieee"):
        with in_precision(torch.backends.cudnn.conv, precision):
            assert cuda._tensor_cores(torch.float32) == (precision == "tf32")


def test_a_graph_is_for_the_settings_of_its_capture(monkeypatch):
    def changed():
        return graph_settings() != before

    before = graph_settings()
    assert not changed()
    with use_backend("add_norm=reference"):
        assert changed()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert changed()
    torch.use_deterministic_algorithms(True)
    try:
        assert changed()
    finally:
        torch.use_deterministic_algorithms(False)
    for dtype in (torch.float16, torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
            patch.setattr(torch, "get_autocast_dtype", lambda kind, dtype=dtype: dtype if kind == "cuda" else None)
            assert graph_settings()[0] == dtype
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        with in_precision(backend, "tf32" if backend.fp32_precision != "tf32" else "ieee"):
            assert changed()
    assert not changed()
