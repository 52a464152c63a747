"""Calls of ``add_layer_norm``, and its backends against plain PyTorch."""

import torch

from ceit_kernels import add_layer_norm, use_backend

from .accuracy import assert_as_accurate, assert_as_accurate_over_draws
from .where import DEVICE

EPS = 1e-6
# Rows of every block: few, many, one; channels that fill a block and that do not.
SHAPES = [(3, 5, 48), (2, 37, 192), (1, 1, 7), (4, 9, 384), (2, 3, 1000), (70, 1, 64)]
NAMES = ("total", "out", "prefix", "x.grad", "branch.grad", "weight.grad", "bias.grad")
DRAWS = 8


def make_inputs(shape, dtype, branch=True, affine=True, mean=0.0, seed=0, device=DEVICE):
    """x, branch, weight and bias, and the gradients of sum, norm and two prefix tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, dtype=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x = (normal(*shape, dtype=torch.float64) + mean).to(dtype)
    parameters = [normal(shape[-1]), normal(shape[-1])] if affine else [None, None]
    inputs = [x, normal(*shape) if branch else None, *parameters]
    return inputs, [normal(*shape), normal(*shape), normal(shape[0], min(2, shape[1]), shape[2])]


def run(backend, inputs, grads, prefix=None, leaves=None):
    """Results, and gradients of the inputs that are there."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with use_backend(f"add_norm={backend}"):
        results = add_layer_norm(*inputs, EPS, num_prefix_tokens=prefix)
    wanted = [t for t in inputs if t is not None] if leaves is None else [inputs[i] for i in leaves]
    gradients = torch.autograd.grad(results, wanted, grads[: len(results)])
    return [*(t.detach() for t in results), *gradients]


def compute(backend, inputs, grads, prefix=None):
    """Results: of the backend, plain and exact."""
    wide = [None if t is None else t.double() for t in inputs]
    return (
        run(backend, inputs, grads, prefix),
        run("reference", inputs, grads, prefix),
        run("reference", wide, [g.double() for g in grads], prefix),
    )


def _names(inputs, prefix):
    names = [name for name in NAMES if prefix is not None or name != "prefix"]
    given = dict(zip(("x.grad", "branch.grad", "weight.grad", "bias.grad"), inputs, strict=True))
    return [name for name in names if given.get(name, name) is not None]


def check(backend, inputs, grads, prefix=None):
    """The error rule, for results and all gradients of a backend."""
    assert_as_accurate(_names(inputs, prefix), *compute(backend, inputs, grads, prefix))


def check_over_draws(backend, make, prefix=None):
    """The error rule over calls of which ``make(draw)`` gives the inputs and the gradients."""
    calls = (compute(backend, *make(draw), prefix) for draw in range(DRAWS))
    assert_as_accurate_over_draws(_names(make(0)[0], prefix), calls, fewest=1)


def check_to_rounding(backend, inputs, grads, prefix=None, atol=1e-12):
    ours, theirs = (run(name, inputs, grads, prefix) for name in (backend, "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=atol)


def magnification(inputs):
    """The largest reciprocal deviation of a row: so much a norm's backward magnifies what its differences are off."""
    total = inputs[0] if inputs[1] is None else inputs[0] + inputs[1]
    return (total.var(-1, correction=0) + EPS).rsqrt().max().item()
