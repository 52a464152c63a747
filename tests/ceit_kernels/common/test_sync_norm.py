"""BatchNorm over several processes, by one that has another beside it with the same batch."""

import copy

import pytest
import torch
from torch import nn

from ceit_kernels.common import sync_norm
from ceit_kernels.common.sync_norm import SyncBatchNorm2d


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setattr(sync_norm, "process_group_of_norm", lambda norm: "both" if norm.training else None)
    monkeypatch.setattr(sync_norm, "_sum_over", lambda x, group: 2 * x)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"eps": 0.5, "momentum": 0.3}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_is_batchnorm_of_the_batches_of_all(options):
    norm = nn.Sequential(SyncBatchNorm2d(3, **options, dtype=torch.float64))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    plain = copy.deepcopy(norm)
    plain[0].__class__ = nn.BatchNorm2d
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        out, expected = norm(x), plain(torch.cat((x, x)))
        torch.testing.assert_close(out, expected[:2])
        torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))
        gradients = [
            torch.autograd.grad((y * w).sum(), x)[0] for y, w in ((out, weight), (expected, weight.repeat(2, 1, 1, 1)))
        ]
        torch.testing.assert_close(2 * gradients[0], gradients[1])
    for each in (norm, plain):
        each.eval()
    torch.testing.assert_close(norm(x), plain(x))


def test_takes_statistics_of_bfloat16_in_float32():
    norm, x = SyncBatchNorm2d(3), 100 + torch.randn(2, 3, 8, 8)
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    expected = nn.BatchNorm2d(3)(x.bfloat16().float())
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(x[0])


def test_takes_the_place_of_batchnorm_alone():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.Sequential(nn.BatchNorm2d(2)))
    SyncBatchNorm2d.convert(model)
    kinds = [type(module) for module in model.modules() if hasattr(module, "running_mean")]
    assert kinds == [SyncBatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm, SyncBatchNorm2d]
