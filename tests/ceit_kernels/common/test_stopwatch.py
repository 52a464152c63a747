"""How long a call takes a GPU, by one whose clock moves a millisecond at every call."""

from types import SimpleNamespace

import pytest
import torch
from support.fake_cuda import FakeCuda

from ceit_kernels.common import stopwatch


def test_a_call_takes_the_time_that_it_has_on_the_gpu_less_the_sweeps(monkeypatch):
    cuda, sweeps = FakeCuda(), []

    def empty(count, dtype, device):
        return SimpleNamespace(zero_=lambda: sweeps.append((count, dtype, device)) or cuda.call("sweep"))

    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=100)
    monkeypatch.setattr(stopwatch, "torch", SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8))
    assert stopwatch.gpu_seconds(lambda: [cuda.call(i) for i in range(3)]) == pytest.approx(3e-3)
    assert set(sweeps) == {(200, torch.uint8, "cuda")}
