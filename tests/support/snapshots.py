"""Small models to take snapshots of."""

import io

import torch
from torch import nn

from ceit_kernels import FusedLeFF

X = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))


def make_leff(seed=0, **options):
    """A block in evaluation mode whose norms do something."""
    torch.manual_seed(seed)
    leff = FusedLeFF(32, 64, **options).eval()
    for norm in leff.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
    return leff


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(make_leff(), nn.Linear(32, 48), nn.GELU()).eval()


def through_a_file(module, **options):
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False, **options)
