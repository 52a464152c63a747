"""Modules of other libraries with their inputs, and what is to be the same after fusing them."""

import copy

import torch
from torch import nn

from ceit_kernels import fuse, use_backend

from .accuracy import assert_as_accurate_over_draws


def grown(module, seed=0):
    """The module with parameters and running statistics of ordinary size that all matter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1) else -1.0
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (1.5 - low) + low
            tensor.data = values / max(1, tensor[0].numel() if tensor.dim() > 1 else 1) ** 0.5
    return module.double()


def step(backend, module, inputs, draw=0):
    """Outputs, gradients of the inputs and of every parameter, and buffers afterwards, by name."""
    generator = torch.Generator().manual_seed(draw)
    inputs = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    leaves.update(module.named_parameters())
    with use_backend(f"leff={backend}"):
        out = module(*inputs)
        weight = torch.randn(out.shape, generator=generator).to(out)
        gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    named = {f"{name}.grad": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"out": out.detach(), **named, **{name: buffer.clone() for name, buffer in module.named_buffers()}}


def assert_equal_in_float64(module, inputs, backend="native", tolerance=1e-9):
    """A fused copy computes what a plain module does, but for rounding relative to the largest number of its kind."""
    expected = step("auto", copy.deepcopy(module), inputs)
    found = step(backend, fuse(copy.deepcopy(module)), inputs)
    assert list(found) == list(expected)
    largest = max(value.abs().max() for name, value in expected.items() if name.endswith(".grad"))
    for name, value in expected.items():
        scale = largest if name.endswith(".grad") else value.abs().max()
        error = (found[name] - value).abs().max()
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


def assert_accurate_in_float32(make, backend="native", draws=6):
    """The error rule for the module and the inputs in float64 that ``make`` gives for a draw."""

    def results(draw):
        module, inputs = make(draw)
        low = [x.float() if isinstance(x, torch.Tensor) else x for x in inputs]
        exact_module = copy.deepcopy(module).float().double()
        exact_inputs = [x.double() if isinstance(x, torch.Tensor) else x for x in low]
        single = copy.deepcopy(module).float()
        exact = step("auto", exact_module, exact_inputs, draw)
        plain, fused = step("auto", copy.deepcopy(single), low, draw), step(backend, fuse(single), low, draw)
        names = [name for name, value in exact.items() if value.is_floating_point()]
        return names, [[found[name] for name in names] for found in (fused, plain, exact)]

    names, first = results(0)
    assert_as_accurate_over_draws(names, (results(draw)[1] if draw else first for draw in range(draws)))


def fused_names(model):
    """The names of a model's modules that ``fuse`` finds beside its linear layers, and their plain classes."""
    fused = fuse(copy.deepcopy(model), linear=False)
    return {name: type(m).plain_class for name, m in fused.named_modules() if hasattr(type(m), "plain_class")}


class FirstResult(nn.Module):
    """A model whose result is its first tensor, whatever kind of output the library has."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        return out if isinstance(out, torch.Tensor) else out.to_tuple()[0]
