"""Bytes that a call moves between device memory and the chip: every tensor of every kernel counted once."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ceit_kernels.i2t import cuda
from ceit_kernels.i2t.arguments import Stem

BATCH, SIDE, CHANNELS = 256, 224, 64
MULTIPROCESSORS = 132


@pytest.fixture
def calls(monkeypatch):
    """The tensors of the calls of the compiled operators, without performing them."""
    seen = []

    def record(name):
        return lambda *arguments: seen.append((name, [a for a in arguments if isinstance(a, torch.Tensor)]))

    for name in ("_i2t_forward", "_i2t_backward"):
        monkeypatch.setattr(torch.ops.ceit, name, record(name))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda x: MULTIPROCESSORS)
    with FakeTensorMode():
        yield seen


def size(tensor):
    return tensor.numel() * tensor.element_size()


def megabytes(calls, out):
    """Every tensor of a call once, and what a later kernel of the call touches again: moments and sums are written and
    read, and in training the normalisation reads and writes the result."""
    total = 0
    for name, tensors in calls:
        total += sum(map(size, tensors))
        if name == "_i2t_forward" and len(tensors) == 10:
            total += 2 * size(out) + size(tensors[7])
        if name == "_i2t_backward":
            total += size(tensors[8])
    return total / 1e6


def arguments():
    x = torch.empty(BATCH, 3, SIDE, SIDE, dtype=torch.bfloat16)
    weight, gamma, beta = torch.empty(CHANNELS, 3, 7, 7), torch.empty(CHANNELS), torch.empty(CHANNELS)
    return x, weight, gamma, beta


def test_a_training_step_moves_at_most_700_megabytes(calls):
    x, weight, gamma, beta = arguments()
    stem = Stem(weight, gamma, beta, None, None, 1e-5)
    out, indices, mean, variance, _ = cuda.i2t_forward_cuda(x, stem, True, torch.bfloat16)
    stem = stem._replace(mean=mean, variance=variance)
    cuda.i2t_backward_cuda(out, x, stem, indices, True, False, torch.bfloat16)
    assert [name for name, _ in calls] == ["_i2t_forward", "_i2t_backward"]
    assert 600 < megabytes(calls, out) <= 700


def test_inference_moves_at_most_200_megabytes(calls):
    x, weight, gamma, beta = arguments()
    mean, variance = torch.empty(CHANNELS), torch.empty(CHANNELS)
    stem = Stem(weight, gamma, beta, mean, variance, 1e-5)
    out, *_ = cuda.i2t_forward_cuda(x, stem, False, torch.bfloat16)
    assert 170 < megabytes(calls, out) <= 200
