"""Stems and what they compute, for the tests."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ceit_kernels import FusedImage2Tokens, use_backend
from support.where import DEVICE

NAMES = ("out", "grad_weight", "grad_gamma", "grad_beta", "grad_x")
STATISTICS = ("running_mean", "running_var")
GAMMAS = ("positive", "negative", "zero", "mixed")


def make_stem(in_chans=3, out_chans=32, gamma="mixed", training=True) -> FusedImage2Tokens:
    """A stem in float64 whose BatchNorm has seen data."""
    stem = FusedImage2Tokens(in_chans, out_chans).double()
    signs = {"positive": 1.0, "negative": -1.0, "zero": 0.0}
    with torch.no_grad():
        stem.conv.weight.normal_(std=(in_chans * 49) ** -0.5)
        stem.bn.weight.uniform_(0.5, 1.5)
        if gamma == "mixed":
            stem.bn.weight.mul_(torch.tensor([1.0, -1.0, 0.0]).repeat(out_chans)[:out_chans])
        else:
            stem.bn.weight.mul_(signs[gamma])
        stem.bn.bias.normal_()
        stem.bn.running_mean.normal_(std=0.3)
        stem.bn.running_var.uniform_(0.5, 2.0)
    return stem.to(DEVICE).train(training)


def run_stem(stem: nn.Module, x: Tensor, grad_out: Tensor, backend: str) -> tuple[list[Tensor], nn.BatchNorm2d]:
    """Result and gradients as in NAMES, and the BatchNorm afterwards; the stem stays as it is."""
    stem, x = copy.deepcopy(stem), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(f"i2t={backend}"):
        out = stem(x)
    leaves = [stem.conv.weight, stem.bn.weight, stem.bn.bias, x]
    return [out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))], stem.bn


def compare_stem(stem: nn.Module, x: Tensor, grad_out: Tensor) -> list[list[Tensor]]:
    """What NAMES and STATISTICS name: of the native backend, plain and exact, which is float64 on the same values."""
    wide = copy.deepcopy(stem).double(), x.double(), grad_out.double()
    runs = (
        run_stem(stem, x, grad_out, "native"), run_stem(stem, x, grad_out, "reference"), run_stem(*wide, "reference")
    )  # fmt: skip
    return [[*results, *(getattr(norm, name) for name in STATISTICS)] for results, norm in runs]


def pooled_like(x: Tensor, out_chans: int) -> Tensor:
    """Random values of the result's shape."""
    height, width = ((((size - 1) // 2 + 1) - 1) // 2 + 1 for size in x.shape[2:])
    return torch.randn(x.shape[0], out_chans, height, width, dtype=x.dtype, device=x.device)
