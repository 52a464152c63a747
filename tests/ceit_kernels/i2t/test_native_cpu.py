"""The stem's inference on the CPU against plain PyTorch."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate

from ceit_kernels import BackendError, FusedImage2Tokens, use_backend
from ceit_kernels.i2t import native_cpu

SIZES = [(7, 7), (1, 1), (33, 17), (97, 61), (224, 224)]


@pytest.fixture(autouse=True)
def host_code():
    """Here the code for the CPU is meant."""
    with use_backend("i2t=native"):
        yield


def make_stem(dtype, in_chans=3, out_chans=64):
    torch.manual_seed(0)
    stem = FusedImage2Tokens(in_chans, out_chans)
    torch.nn.init.normal_(stem.bn.weight)
    torch.nn.init.normal_(stem.bn.bias)
    torch.nn.init.normal_(stem.bn.running_mean)
    torch.nn.init.uniform_(stem.bn.running_var, 0.5, 2.0)
    return stem.eval().requires_grad_(False).to(dtype)


def make_images(batch, channels, size, dtype):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(backend, stem, x):
    with use_backend(f"i2t={backend}"):
        return stem(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_agrees_with_plain_pytorch(poisoned_memory, batch, size, dtype):
    stem, x = make_stem(dtype), make_images(batch, 3, size, dtype)
    exact = run("reference", copy.deepcopy(stem).double(), x.double())
    assert_as_accurate(["out"], [run("native", stem, x)], [run("reference", stem, x)], [exact])


@pytest.mark.parametrize("channels", [(1, 32), (4, 96), (6, 20), (3, 7)], ids=str)
def test_takes_any_number_of_channels(channels):
    stem, x = make_stem(torch.float64, *channels), make_images(2, channels[0], (20, 30), torch.float64)
    torch.testing.assert_close(run("native", stem, x), run("reference", stem, x))


def test_the_images_of_a_batch_are_taken_in_parts(monkeypatch):
    stem, x = make_stem(torch.float64), make_images(5, 3, (20, 30), torch.float64)
    monkeypatch.setattr(native_cpu, "_IMAGES_AT_A_TIME", 2)
    torch.testing.assert_close(stem(x), run("reference", stem, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_where_plain_pytorch_has_it(value):
    stem, x = make_stem(torch.float32), make_images(1, 3, (40, 40), torch.float32)
    x[0, 1, 10, 20] = value
    torch.testing.assert_close(stem(x), run("reference", stem, x), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_takes_strided_images_and_gives_channels_last():
    stem, x = make_stem(torch.float32), make_images(2, 3, (40, 36), torch.float32)
    expected = run("reference", stem, x)
    for images in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        out = stem(images)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_autocast_computes_in_bfloat16():
    stem, x = make_stem(torch.float32), make_images(2, 3, (40, 36), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = stem(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), run("reference", stem, x), rtol=0.05, atol=0.1)


def test_compiles_and_exports_without_a_break():
    stem, x = make_stem(torch.float32), make_images(2, 3, (20, 24), torch.float32)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stem(x))
    torch.testing.assert_close(torch.export.export(stem, (x,)).module()(x), stem(x))


def test_registration_passes_pytorchs_own_checks():
    stem, x = make_stem(torch.float32), make_images(2, 3, (20, 24), torch.float32)
    bn = stem.bn
    tensors = (x, stem.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    torch.library.opcheck(torch.ops.ceit.i2t, (*tensors, 1e-5, False, None, "native"))


def test_training_is_refused_and_left_to_plain_pytorch():
    stem, x = make_stem(torch.float32).train().requires_grad_(True), make_images(2, 3, (20, 24), torch.float32)
    with pytest.raises(BackendError, match="i2t has no native implementation of training on the CPU"):
        stem(x)
    with use_backend("auto"):
        assert stem(x).requires_grad
    tensors = (x, stem.conv.weight, None, None, None, None)
    with pytest.raises(BackendError, match="the code for the CPU is for inference"):
        torch.ops.ceit.i2t(*tensors, 1e-5, False, None, "native")


def test_an_empty_batch_is_left_to_plain_pytorch():
    stem = make_stem(torch.float32)
    with use_backend("auto"):
        assert stem(torch.zeros(0, 3, 20, 24)).shape == (0, 64, 5, 6)
