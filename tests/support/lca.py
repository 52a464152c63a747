"""Calls of ``lca_attention``, and its backends against plain PyTorch."""

import torch

from ceit_kernels import lca_attention, use_backend

from .accuracy import assert_as_accurate, assert_as_accurate_over_draws
from .where import DEVICE

# batch, layers, channels, heads; the last of them in every block, none, one or several
SHAPES = [(3, 12, 48, 3), (17, 5, 40, 2), (2, 37, 24, 1), (1, 1, 16, 1), (2, 3, 96, 2)]
NAMES = ("out", "x.grad", "qkv_weight.grad", "qkv_bias.grad")
DRAWS = 8


def make_inputs(batch, layers, channels, heads, dtype, bias=True, mean=0.0, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x = normal(batch, layers, channels) + mean
    weight = normal(3 * channels, channels) * channels**-0.5
    return [x, weight, normal(3 * channels) if bias else None], normal(batch, 1, channels)


def run(backend, inputs, grad_out, **options):
    """Output and gradients of the inputs that are there."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with use_backend(f"lca={backend}"):
        out = lca_attention(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, [t for t in inputs if t is not None], grad_out)]


def compute(backend, inputs, grad_out, **options):
    """Results: of the backend, plain and exact."""
    wide = [None if t is None else t.double() for t in inputs]
    return (
        run(backend, inputs, grad_out, **options),
        run("reference", inputs, grad_out, **options),
        run("reference", wide, grad_out.double(), **options),
    )


def check(backend, inputs, grad_out, **options):
    names = NAMES[: 1 + len([t for t in inputs if t is not None])]
    assert_as_accurate(names, *compute(backend, inputs, grad_out, **options))


def check_over_draws(backend, make, **options):
    """The error rule over calls of which ``make(draw)`` gives the inputs and the gradient."""
    names = NAMES[: 1 + len([t for t in make(0)[0] if t is not None])]
    calls = (compute(backend, *make(draw), **options) for draw in range(DRAWS))
    assert_as_accurate_over_draws(names, calls, fewest=1)


def check_to_rounding(backend, inputs, grad_out, **options):
    ours, theirs = (run(name, inputs, grad_out, **options) for name in (backend, "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
