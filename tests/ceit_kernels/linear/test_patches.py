"""The projection of patches as a linear layer on the CPU against plain PyTorch's convolution."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate
from torch import nn

from ceit_kernels import FusedPatchProjection, use_backend

NAMES = ("out", "x.grad", "weight.grad", "bias.grad")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("linear=native"):
        yield


def make_call(size=(2, 6, 12, 20), out_channels=24, kernel_size=(4, 4), dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = FusedPatchProjection(size[1], out_channels, kernel_size, stride=kernel_size, bias=bias)
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    rows, columns = (side // patch for side, patch in zip(size[2:], kernel_size, strict=True))
    return layer.to(dtype), x.to(dtype), torch.randn(size[0], out_channels, rows, columns).to(dtype)


def run(backend, layer, x, grad_out):
    x = x.detach().requires_grad_()
    with use_backend(f"linear={backend}"):
        out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad_out)]


def check(layer, x, grad_out):
    exact = run("reference", copy.deepcopy(layer).double(), x.double(), grad_out.double())
    fused, plain = (run(backend, layer, x, grad_out) for backend in ("native", "reference"))
    if x.dtype == torch.float64:
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(NAMES[: len(fused)], fused, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((2, 6, 12, 20), (4, 4)), ((1, 3, 5, 7), (2, 3)), ((3, 5, 4, 4), (4, 4)), ((2, 32, 56, 56), (4, 4))],
)
def test_agrees_with_plain_pytorch(size, kernel_size, dtype):
    check(*make_call(size, kernel_size=kernel_size, dtype=dtype))


def test_takes_maps_in_any_memory_and_no_bias():
    layer, x, grad_out = make_call(bias=False)
    check(layer, x.contiguous(), grad_out)
    check(layer, x[:1].expand(2, -1, -1, -1), grad_out[:1].expand(2, -1, -1, -1))


def test_inference_follows_a_weight_that_changes():
    layer, x, _ = make_call()
    with torch.no_grad():
        before = layer.eval()(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)


def test_its_tokens_lie_one_after_another():
    layer, x, _ = make_call()
    assert layer(x).flatten(2).transpose(1, 2).is_contiguous()


def test_compiles_and_exports_without_a_break():
    layer, x, grad_out = make_call()
    expected = run("native", layer, x, grad_out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("native", compiled, x, grad_out), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected[0])


def test_fuses_over_the_same_state():
    plain = nn.Conv2d(3, 5, 4, stride=4)
    fused = FusedPatchProjection.from_plain(plain)
    assert fused.weight is plain.weight
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}], ids=str)
def test_patches_that_are_not_side_by_side_are_refused(options):
    with pytest.raises(TypeError, match="FusedPatchProjection cannot stand in for this Conv2d: the kernels have"):
        FusedPatchProjection.from_plain(nn.Conv2d(3, 5, 4, **options))


def test_maps_of_other_channels_and_types_are_refused():
    layer, x, _ = make_call()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 6, H, W\), got \(2, 5, 12, 20\)"):
        layer(x[:, :5])
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 like weight"):
        layer(x.double())
