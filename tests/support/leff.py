"""LeFF modules and inputs for tests, running them, and comparing implementations."""

import copy

import torch
from torch import nn

from ceit_kernels import FusedLeFF, leff_block, use_backend
from ceit_kernels.leff.arguments import settings_of

from .accuracy import assert_as_accurate_over_draws
from .where import DEVICE

# batch, height, width, prefix tokens, channels in, hidden and out, kernel size; norms
TRAINING_CASES = [
    ((2, 5, 4, 1, 24, 40, 24, 3), "bbb"),
    ((3, 1, 1, 2, 16, 16, 16, 7), "bbb"),
    ((2, 2, 3, 0, 5, 24, 136, 5), "nnn"),
    ((1, 4, 5, 1, 9, 18, 9, 3), "bfn"),
    ((2, 3, 2, 0, 8, 70, 20, 3), "nbf"),
]

# channels, side of the image, prefix tokens; hidden channels are four times the channels, and Mix-FFN has no norms
SHAPES = {
    "tiny": (192, 14, 1),
    "small": (384, 14, 1),
    "base": (768, 14, 1),
    "tiny at 384": (192, 24, 1),
    "small at 384": (384, 24, 1),
    "Mix-FFN 56x56x64": (64, 56, 0),
    "Mix-FFN 14x14x320": (320, 14, 0),
}
MODELS = ("tiny", "small", "base")


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


def make_call(case, dtype, norms="bbb", draw=0, **options):
    """A module that trains, tokens, a gradient and the grid."""
    batch, height, width, prefix, channels, hidden, out, kernel_size = case
    leff = make_training_leff(channels, hidden, out, kernel_size, dtype, prefix, norms, seed=draw, **options)
    x = make_tokens(batch, prefix + height * width, channels, dtype, seed=2 * draw)
    grad_out = make_tokens(batch, prefix + height * width, out, dtype, seed=2 * draw + 1)
    return leff, x, grad_out, (height, width)


def compute(backend, leff, x, grad_out, grid_size, residual=None):
    """Results of a training step by name: fused, plain and exact."""
    doubled = None if residual is None else residual.double()
    exact = train_step("reference", copy.deepcopy(leff).double(), x.double(), grad_out.double(), grid_size, doubled)
    inputs = (x, grad_out, grid_size, residual)
    fused, plain = (train_step(name, copy.deepcopy(leff), *inputs) for name in (backend, "reference"))
    assert list(fused) == list(plain) == list(exact)
    return fused, plain, exact


def check(backend, make, most):
    """The error rule over at most so many draws that ``make`` gives, for the result, every gradient and the running
    statistics; the fused results of those that it took.
    """
    draws = [compute(backend, *make(0))]
    names = [name for name in draws[0][0] if not name.endswith("num_batches_tracked")]

    def results():
        yield from draws
        for draw in range(1, most):
            draws.append(compute(backend, *make(draw)))
            yield draws[-1]

    assert_as_accurate_over_draws(names, ([[r[name] for name in names] for r in draw] for draw in results()))
    return [fused for fused, _, _ in draws]


def check_to_rounding(backend, leff, *inputs, tolerance=1e-11):
    plain, fused = (train_step(name, copy.deepcopy(leff), *inputs) for name in ("reference", backend))
    for name, expected in plain.items():
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(fused[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: n + m)


def check_kinks(backend, kinks):
    """An activation and its derivative where its derivative jumps, for each that has such places."""
    x = torch.tensor(kinks, dtype=torch.float64, device=DEVICE).view(1, -1, 1)
    weights = [torch.ones(1, 1, 1, 1, dtype=x.dtype, device=DEVICE)] * 3
    weights[1] = nn.functional.pad(weights[1], (1, 1, 1, 1))
    for name in ("relu", "relu6", "hardswish"):
        results = []
        for each in ("reference", backend):
            leaf = x.clone().requires_grad_()
            with use_backend(f"leff={each}"):
                out = leff_block(leaf, weights, activations=(name, "identity"), grid_size=(1, len(kinks)))
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
        for fused, plain in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-14, atol=1e-14, msg=name)


def make_shape(shape, dtype, mode, batch=256, kernel_size=3, norm_dtype=None):
    """Tokens, parameters and settings of one of ``SHAPES``; norms in a mode, where it has norms."""
    channels, side, prefix = SHAPES[shape]
    hidden, mode = 4 * channels, mode if prefix else "none"
    x = torch.empty(batch, prefix + side * side, channels, device="cuda", dtype=dtype)
    parameters = []
    for size in ((hidden, channels, 1, 1), (hidden, 1, kernel_size, kernel_size), (channels, hidden, 1, 1)):
        norm = [x.new_empty(size[0], dtype=norm_dtype or dtype) for _ in range(4)] if prefix else [None] * 4
        parameters += [x.new_empty(size), x.new_empty(size[0]), *norm]
    activations = ["gelu" if prefix else "identity", "gelu"]
    return x, parameters, settings_of([1e-5] * 3, [mode] * 3, side, side, prefix, activations, None, dtype, "triton")
