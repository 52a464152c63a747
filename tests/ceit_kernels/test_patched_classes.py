"""Classes and functions that somebody gives another implementation than their library did, before and after fusing."""

import contextlib
import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from support.adapters import grown
from timm.models import tiny_vit
from torch import nn
from torch.overrides import TorchFunctionMode

from ceit import CeiT
from ceit.blocks import Block, LCABlock
from ceit_kernels import FusedLinear, freeze, fuse
from ceit_kernels.attention import Attention
from ceit_kernels.lca import LCAAttention
from ceit_kernels.leff import LocallyEnhancedFeedForward

X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def changed(out):
    """Not a multiple of it, which a norm would not show."""
    return out + 0.25 * out.sin()


@contextlib.contextmanager
def patched(kind, name="forward", wraps=True):
    """Results of a method are others; its wrapper has its name or one of its own."""
    method = getattr(kind, name)

    def other(*arguments, **options):
        return changed(method(*arguments, **options))

    setattr(kind, name, functools.wraps(method)(other) if wraps else other)
    try:
        yield
    finally:
        setattr(kind, name, method)


def of_timm():
    return timm.create_model("mobilenetv2_035", num_classes=5)


def of_ceit():
    return CeiT(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def of_tiny_vit():
    sizes = {"embed_dims": (8, 12), "depths": (1, 1), "num_heads": (1, 3), "window_sizes": (7, 4)}
    return tiny_vit.TinyVit(**sizes, num_classes=5)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 200))


def made(make):
    torch.manual_seed(0)
    return grown(make()).eval()


CASES = [
    (of_timm, nn.Conv2d, "forward"),
    (of_timm, nn.Conv2d, "_conv_forward"),
    (of_timm, nn.ReLU6, "forward"),
    (of_timm, timm.layers.BatchNormAct2d, "forward"),
    (of_timm, timm.models._efficientnet_blocks.InvertedResidual, "forward"),
    (of_timm, timm.models.efficientnet.EfficientNet, "forward_features"),
    (of_tiny_vit, tiny_vit.Attention, "get_attention_biases"),
    (of_ceit, nn.LayerNorm, "forward"),
    (of_ceit, nn.Identity, "forward"),
    (of_ceit, CeiT, "forward_head"),
    (of_ceit, Block, "_forward"),
    (of_ceit, LCABlock, "_forward"),
    (of_ceit, Attention, "_attend"),
    (of_ceit, LCAAttention, "_attend"),
    (of_ceit, LocallyEnhancedFeedForward, "forward"),
    (linear, nn.Linear, "forward"),
    (linear, nn.Linear, "__call__"),
    (of_ceit, F, "linear"),
    (of_ceit, F, "conv2d"),
    (of_ceit, F, "layer_norm"),
    (of_ceit, F, "scaled_dot_product_attention"),
    (of_timm, F, "batch_norm"),
]
cases = pytest.mark.parametrize(("make", "kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", None))


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapped", "other"])
@cases
def test_another_method_of_a_class_is_called(make, kind, name, wraps):
    if kind is nn.ReLU6:
        name, kind = "forward", nn.Hardtanh  # which it inherits from
    model = made(make)
    fused, frozen = fuse(copy.deepcopy(model)), freeze(model)
    with torch.no_grad():
        before = [fused(X), frozen(X)]
        with patched(kind, name, wraps):
            expected = model(X)
            assert (expected - before[0]).abs().max() > 1e-6 * before[0].abs().max()
            for module in (fused, frozen, fuse(copy.deepcopy(model)), freeze(model)):
                torch.testing.assert_close(module(X), expected, rtol=1e-9, atol=1e-12)
        for module, out in zip((fused, frozen), before, strict=True):
            assert torch.equal(module(X), out)


@torch.no_grad()
def test_another_method_of_a_model_is_called():
    model = made(of_ceit)
    own = model.forward_head
    model.forward_head = lambda *arguments: 1.25 * own(*arguments)
    torch.testing.assert_close(freeze(model)(X), model(X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("path", "name"),
    [("blocks.1", "_forward"), ("blocks.1.attn", "_attend"), ("lca", "_forward"), ("lca.attn", "_attend"),
     ("i2t.proj", "_conv_forward")],
)  # fmt: skip
def test_another_method_of_a_part_is_called(path, name, training):
    model = made(of_ceit).train(training)
    frozen = freeze(model)
    models = [model, fuse(copy.deepcopy(model)), *([] if training else [frozen.model])]
    with torch.set_grad_enabled(training):
        for each in models:
            part = each.get_submodule(path)
            setattr(part, name, functools.partial(lambda own, *given: changed(own(*given)), getattr(part, name)))
        expected, before = model(X), made(of_ceit).train(training)(X)
        assert (expected - before).abs().max() > 1e-6 * before.abs().max()
        for each in (models[1],) if training else (models[1], frozen, freeze(model)):
            torch.testing.assert_close(each(X), expected, rtol=1e-9, atol=1e-12)


class Larger(TorchFunctionMode):
    """Results of a function are larger."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __torch_function__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        return 1.25 * out if function is self.function else out


@pytest.mark.parametrize("function", [F.linear, F.conv2d, F.gelu], ids=lambda function: function.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_a_mode_sees_the_functions_that_modules_call(function, training):
    model = made(of_ceit).train(training)
    fused, frozen = fuse(copy.deepcopy(model)), freeze(model)
    with Larger(function), torch.set_grad_enabled(training):
        expected = model(X)
        for module in (fused,) if training else (fused, frozen):
            torch.testing.assert_close(module(X), expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_another_method_are_taken():
    model = made(of_timm).train()
    fused = fuse(copy.deepcopy(model))
    with patched(timm.layers.BatchNormAct2d):
        for module in (model, fused):
            module(X).sum().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for one, other in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-9 * largest)


def test_a_class_that_came_with_another_librarys_forward_may_be_fused():
    class Mine(nn.Linear):
        forward = nn.Linear.forward

    assert FusedLinear.from_plain(Mine(4, 4)).plain_reason() is None
