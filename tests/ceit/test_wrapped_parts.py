"""Parts of the model that are wrapped, replaced or watched: all that the model asks of a part is a call."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ceit import CeiT
from ceit_kernels import fuse

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
PARTS = ["i2t", "i2t.backbone", "i2t.proj", "blocks.0", "blocks.1", "blocks.2", "blocks.2.leff", "lca", "norm", "head"]


class Wrapper(nn.Module):
    """Has nothing but a call, which it counts."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


class Forwarding(Wrapper):
    """Pretends to be what it wraps, as FullyShardedDataParallel and OptimizedModule do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def model(request):
    torch.manual_seed(0)
    model = CeiT(**SMALL).double()
    return (fuse(model) if request.param else model).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def replaced(model, name, make):
    """A copy of a model with a part of it replaced, and what took the part's place."""
    model = copy.deepcopy(model)
    parent, _, last = name.rpartition(".")
    part = make(model.get_submodule(name))
    model.get_submodule(parent).register_module(last, part)
    return model, part


def trained(model, images):
    """Logits, gradients and buffers of a training step; no gradient counts as a gradient of zero."""
    model.train().zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logits, gradients, list(model.buffers())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrap", [Wrapper, Forwarding])
@pytest.mark.parametrize("name", PARTS)
def test_a_wrapped_part_is_called_and_nothing_changes(model, images, name, wrap):
    wrapped, part = replaced(model, name, wrap)
    with torch.no_grad():
        close(wrapped(images), model(images))
        close(wrapped.forward_features(images), model.forward_features(images))
        close(wrapped.forward_intermediates(images)[1], model.forward_intermediates(images)[1])
    assert part.calls == {"norm": 5, "head": 1}.get(name, 3)
    close(trained(wrapped, images), trained(model, images))


@pytest.mark.parametrize("name", ["i2t", "blocks.0", "blocks.2", "lca"])
def test_a_part_with_an_adapter_beside_it_trains_the_adapter(model, images, name):
    class Adapter(Wrapper):
        def __init__(self, inner):
            super().__init__(inner)
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, *args):
            return super().forward(*args) * self.scale

    adapted, part = replaced(model, name, Adapter)
    close(trained(adapted, images)[0], trained(model, images)[0])
    assert part.scale.grad != 0


def test_all_parts_wrapped_follow_another_size(model, images):
    expected = copy.deepcopy(model)
    for name in ("i2t.backbone.conv", "i2t.backbone", "i2t.proj", "i2t"):
        model, _ = replaced(model, name, Wrapper)
    for resized in (model, expected):
        resized.set_input_size((48, 64), patch_size=2)
    with torch.no_grad():
        close(model(images[:, :, :48]), expected(images[:, :, :48]))
    assert [info["reduction"] for info in model.feature_info] == [8] * 3
    with pytest.raises(ValueError, match=r"x: expected images \(B, 3, H, W\), got shape \(2, 1, 48, 64\)"):
        model(images[:, :1, :48])


def test_a_stem_of_someone_elses_sets_the_grid_but_not_the_size(images):
    class Stem(nn.Conv2d):
        pass

    model = CeiT(**SMALL, dynamic_img_size=True).double().eval()
    model.i2t = Stem(3, 32, 16, 16).double()
    assert model(images[:, :, :48]).shape == (2, 7)
    assert model.forward_intermediates(images[:, :, :48], intermediates_only=True)[0].shape == (2, 32, 3, 4)
    with pytest.raises(TypeError, match="i2t: expected an I2TEmbed or a wrapper of one, got Stem"):
        model.set_input_size(32)


def test_a_projection_without_a_convolution_is_not_resampled():
    model = CeiT(**SMALL)
    model.i2t.proj = nn.Identity()
    with pytest.raises(TypeError, match="patch_size: expected a convolution in proj to resample, got Identity"):
        model.set_input_size(patch_size=2)
    assert (model.i2t.patch_size, model.grid_size) == ((4, 4), (4, 4))


def test_a_stem_without_convolutions_takes_images_of_any_channels(images):
    model = CeiT(**SMALL).double().eval()
    model.i2t.backbone = nn.AvgPool2d(4)
    model.i2t.proj = nn.Conv2d(2, 32, 4, 4).double()
    assert model(images[:, :2]).shape == (2, 7)
    with pytest.raises(ValueError, match=r"x: expected images \(B, in_chans, H, W\), got shape \(3, 64, 64\)"):
        model(images[0])


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoint_wrappers_give_the_numbers_of_our_own(images, fused):
    def step(wrap, enable):
        torch.manual_seed(0)
        model = CeiT(**SMALL, leff_with_bn=False, drop_path_rate=0.2, proj_drop_rate=0.1).double()
        model = fuse(model) if fused else model
        model.set_grad_checkpointing(enable)
        for index, block in enumerate(model.blocks):
            model.blocks[index] = wrap(block)
        return trained(model, images)[:2]

    expected = step(lambda block: block, True)
    close(step(checkpoint_wrapper, False), expected)
    close(step(Wrapper, True), expected)


def watch(block, how, seen):
    """Make a block note the results of its calls."""

    def note(out):
        seen.append(tuple(out.shape))
        return out

    def hook(module, args, out):
        if module is block:
            note(out)

    if how == "hook":
        return block.register_forward_hook(hook)
    if how == "global hook":
        return nn.modules.module.register_module_forward_hook(hook)
    if how == "forward":
        forward = block.forward
        block.forward = lambda *args: note(forward(*args))
    elif how == "compile":
        forward = block._call_impl
        block._compiled_call_impl = lambda *args: note(forward(*args))
    return None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("how", ["hook", "global hook", "forward", "compile"])
def test_a_block_that_is_watched_is_called_with_every_token(model, images, how, index, training):
    with torch.no_grad():
        expected = model(images)
    seen = []
    handle = watch(model.blocks[index], how, seen)
    try:
        if training:
            model.train()(images).sum().backward()
        else:
            with torch.no_grad():
                close(model(images), expected)
    finally:
        if handle is not None:
            handle.remove()
    assert seen == [(2, 17, 32)]


@torch.no_grad()
def test_an_unknown_module_in_the_last_block_sees_every_token(model, images):
    model.blocks[2].attn.proj = part = Wrapper(model.blocks[2].attn.proj)
    shapes = []
    part.inner.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    model(images)
    assert shapes == [(2, 17, 32)]
