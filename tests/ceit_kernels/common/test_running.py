"""Running statistics are written as PyTorch's BatchNorm writes them, which autograd does not see."""

import copy

import pytest
import torch
from support.fused_modules import make_pair, native
from torch import nn

import ceit
from ceit_kernels import fuse


def make_model():
    torch.manual_seed(0)
    model = ceit.create_model("ceit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, fused=False)
    return model, fuse(copy.deepcopy(model)), torch.randn(2, 3, 32, 32)


PAIRS = {"leff": lambda: make_pair("leff"), "i2t": lambda: make_pair("i2t"), "model": make_model}
each = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


@each
def test_a_batch_in_training_changes_the_versions_of_buffers_as_in_plain_pytorch(make):
    changes = []
    *modules, x = make()
    for module in modules:
        before = [buffer._version for buffer in module.buffers()]
        with native():
            module.train()(x)
        changes.append([b._version - version for b, version in zip(module.buffers(), before, strict=True)])
    assert changes[1] == changes[0]


@each
def test_a_pass_in_evaluation_goes_backward_behind_one_in_training(make):
    gradients = []
    *modules, x = make()
    for module in modules:
        for norm in module.double().modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0  # PyTorch's first pass would take what the second makes of the running statistics
        with native():
            loss = module.eval()(x.double()).square().mean()
            (loss + module.train()(x.double()).square().mean()).backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
