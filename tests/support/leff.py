"""LeFF modules and inputs for tests, and running them."""

import torch
from torch import nn

from ceit_kernels import FusedLeFF, use_backend

from .where import DEVICE


def make_leff(in_features, hidden, out_features, kernel_size, dtype, prefix=1, seed=0, **options):
    """A module with statistics and affine parameters that matter, ready for inference."""
    torch.manual_seed(seed)
    leff = FusedLeFF(in_features, hidden, out_features, kernel_size, num_prefix_tokens=prefix, **options)
    for norm in leff.children():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return leff.eval().requires_grad_(False).to(DEVICE, dtype)


def make_training_leff(in_features, hidden, out_features, kernel_size, dtype, prefix=1, norms="bbb", **options):
    """A module that trains, each of its norms with batch statistics ("b"), frozen ("f") or not there ("n")."""
    leff = make_leff(in_features, hidden, out_features, kernel_size, dtype, prefix, **options)
    leff.train().requires_grad_(True)
    for name, mode in zip(("bn1", "bn2", "bn3"), norms, strict=True):
        if mode == "n":
            setattr(leff, name, nn.Identity())
        getattr(leff, name).train(mode == "b")
    return leff


@torch.no_grad()
def pass_through_with_means(leff, mean):
    """Make each convolution of a 3 x 3 module the identity plus ``mean``, and each norm keep its last statistics."""
    for convolution in (leff.conv1, leff.conv3):
        convolution.weight.copy_(torch.eye(leff.conv1.in_channels)[:, :, None, None])
    leff.conv2.weight.zero_()[:, :, 1, 1] = 1.0
    for convolution in (leff.conv1, leff.conv2, leff.conv3):
        convolution.bias.fill_(mean)
    for norm in (leff.bn1, leff.bn2, leff.bn3):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
        norm.momentum = 1.0


def make_tokens(batch, tokens, channels, dtype, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64) + mean).to(dtype).to(DEVICE)


def run(backend, leff, x, grid_size=None, residual=None):
    with use_backend(f"leff={backend}"):
        return leff(x, grid_size, residual)


def first_layer_factored(self, g1, gradient1, scratch):
    """In place of ``_Backward._first_layer``: the way of 16 bits in any type."""
    return self._first_layer_factored(g1, gradient1)


def train_step(backend, leff, x, grad_out, grid_size=None, residual=None):
    """The result, the gradients of all that may have one and the buffers afterwards, by name."""
    leaves = {name: parameter for name, parameter in leff.named_parameters() if parameter.requires_grad}
    leaves["x"] = x = x.detach().requires_grad_()
    if residual is not None:
        leaves["residual"] = residual = residual.detach().requires_grad_()
    out = run(backend, leff, x, grid_size, residual)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    named = dict(zip((f"{name}.grad" for name in leaves), gradients, strict=True))
    buffers = {name: buffer.clone() for name, buffer in leff.named_buffers()}
    return {"out": out.detach(), **named, **buffers}
