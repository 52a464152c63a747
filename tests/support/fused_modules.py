"""Plain modules of every operator that ``fuse`` knows, with inputs."""

import copy

import pytest
import torch
from torch import nn

from ceit_kernels import fuse, use_backend
from ceit_kernels.add_norm import AddNorm
from ceit_kernels.attention import Attention
from ceit_kernels.i2t import Image2Tokens
from ceit_kernels.lca import LCAAttention
from ceit_kernels.leff import LocallyEnhancedFeedForward
from ceit_kernels.linear import PatchProjection


class Normed(nn.Module):
    """A residual connection of a tensor with itself and its norm, as a module of one argument."""

    def __init__(self):
        super().__init__()
        self.norm, self.add_norm = nn.LayerNorm(32), AddNorm()

    def forward(self, x):
        return self.add_norm(x, x.sin(), self.norm)[1]


MODULES = {
    "leff": (lambda: LocallyEnhancedFeedForward(32, 64), (2, 17, 32)),
    "leff without norms": (lambda: LocallyEnhancedFeedForward(32, 64, with_bn=False), (2, 17, 32)),
    "lca": (lambda: LCAAttention(32, 2, qkv_bias=True), (2, 5, 32)),
    "i2t": (Image2Tokens, (2, 3, 32, 32)),
    "attention": (lambda: Attention(32, 2), (2, 17, 32)),
    "linear": (lambda: nn.Linear(32, 64), (5, 32)),
    "patches": (lambda: PatchProjection(16, 32, 4, stride=4), (2, 16, 8, 8)),
    "add_norm": (Normed, (2, 17, 32)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make_pair(name, training=True):
    """A plain module, a fused copy of it, and an input."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    plain = make().train(training)
    for module in plain.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return plain, fuse(copy.deepcopy(plain)), torch.randn(shape)


def native():
    """Every operator by compiled code, or an error."""
    return use_backend("native")


def step(module, x):
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = module(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)]


def assert_same(found, expected, rtol=1e-4, atol=1e-4):
    """Lists of tensors that agree but for rounding."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
