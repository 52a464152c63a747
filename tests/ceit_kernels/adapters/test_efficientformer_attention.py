"""Attention of EfficientFormerV2: all its parts are called, and the map that is upsampled is channels-last."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import grown
from timm.models.efficientformer_v2 import Attention2d
from torch import nn

from ceit_kernels import explain, freeze, fuse

# And the size of images.
MODULES = {
    "of smaller images": (lambda: Attention2d(12, 4, 3, 2, resolution=(6, 10), stride=2), (6, 10)),
    "of whole images": (lambda: Attention2d(12, 4, 3, 4, resolution=(5, 3)), (5, 3)),
}
modules = pytest.mark.parametrize("name", MODULES)


def make(name, draw=0, dtype=torch.float64):
    make_module, size = MODULES[name]
    module = grown(make_module(), draw)
    module.train(False)  # whose result is None
    x = torch.randn(2, 12, *size, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    return module.to(dtype), x.to(dtype)


@torch.no_grad()
@modules
def test_computes_what_the_module_does(name):
    module, x = make(name)
    fused = fuse(copy.deepcopy(module))
    assert explain(fused)[0].backend == "native"
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = module(images)
        torch.testing.assert_close(freeze(module)(images), expected, rtol=1e-10, atol=1e-10)
        out = fused(images)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        assert out.stride() == expected.stride()


@torch.no_grad()
@modules
def test_upsamples_channels_last_maps(name):
    module, x = make(name)
    fused, formats = fuse(copy.deepcopy(module)), []
    fused.act.register_forward_pre_hook(
        lambda part, given: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    fused(x)
    assert formats == [name == "of smaller images"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@modules
def test_is_as_accurate_as_the_module(name, dtype):
    def results(draw):
        module, x = make(name, draw, dtype)
        exact = copy.deepcopy(module).double()
        exact.attention_bias_cache = {}
        return [fuse(copy.deepcopy(module))(x)], [module(x)], [exact(x.double())]

    assert_as_accurate_over_draws([name], map(results, range(8)))


@torch.no_grad()
@pytest.mark.parametrize(
    "part", ["stride_conv", "q", "k", "v", "v_local", "talking_head1", "talking_head2", "upsample", "act", "proj"]
)
def test_every_part_is_called(part):
    module, x = make("of smaller images")
    fused, before = fuse(copy.deepcopy(module)), module(x)
    for each in (module, fused):
        each.get_submodule(part).register_forward_hook(lambda part, given, out: out.square())
    torch.testing.assert_close(fused(x), module(x), rtol=1e-10, atol=1e-10)
    assert (fused(x) - before).abs().max() > 1e-4


@modules
def test_training_is_the_modules_own(name):
    module, x = make(name)
    fused = fuse(copy.deepcopy(module))
    for each in (module, fused):
        each.train()
    out = fused(x)
    assert torch.equal(out, module(x))
    assert out.requires_grad
    module.eval(), fused.eval()
    fused.act = nn.Tanh()
    with torch.no_grad():
        assert not torch.equal(fused(x), module(x))
