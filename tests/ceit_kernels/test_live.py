"""Fused modules, and models of them, follow whatever is done to their weights, parts and settings between calls."""

import random

import pytest
import torch
from support.changes import CHANGES, VALUES, Inapplicable, Live
from support.fused_modules import MODULES, native
from torch import nn
from torch.func import functional_call

from ceit import CeiT
from ceit_kernels import FusedLinear, fuse, use_backend
from ceit_kernels.backends import current_backend

MODELS = {
    **MODULES,
    # So large that its product is not left to PyTorch.
    "linear": (lambda: nn.Linear(256, 256), (64, 256)),
    "ceit": (
        lambda: CeiT(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5, mlp_ratio=2.0),
        (3, 3, 32, 32),
    ),
}
# Of the largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}


def make_live(name, dtype=torch.float64, seed=0):
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    return Live(fuse(make()).to(dtype), torch.randn(shape, dtype=dtype), seed)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        error = (one - other).abs().max().item()
        assert error <= TOLERANCE[one.dtype] * max(1e-3, other.abs().max().item())


def fused_backend(live):
    """Compiled code, or an error, unless something was done that the operators leave to plain PyTorch."""
    return use_backend("auto") if live.undo else native()


def check_inference(live, call=None):
    call = call or live.model
    with torch.no_grad():
        with fused_backend(live):
            found = call(live.x)
        with use_backend("reference"):
            assert_close([found], [call(live.x)])


def step(model, x, training):
    """The output, gradients and buffers of a step, which leaves the buffers as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    x = x.clone().requires_grad_()
    out = model.train(training)(x)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)
    results = [out.detach(), *grads, *(buffer.double() for buffer, _ in before)]
    for buffer, kept in before:
        buffer.copy_(kept)
    model.eval()
    return results


def check_gradients(live, training):
    """In float64 alone: batch statistics magnify roundings."""
    if live.x.dtype == torch.float64:
        with fused_backend(live):
            found = step(live.model, live.x, training)
        with use_backend("reference"):
            assert_close(found, step(live.model, live.x, training))


def follow(number):
    """A sequence of changes, drawn from its number, each of them followed by calls."""
    draw = random.Random(number)
    name = list(MODELS)[number % len(MODELS)]
    live = make_live(name, draw.choice((torch.float64, torch.float32)), number)
    try:
        check_inference(live)
        for change in draw.choices(CHANGES, k=draw.randint(3, 6)):
            print(f"{name} in {live.x.dtype}: {change.__name__}")
            try:
                change(live)
            except Inapplicable:
                continue
            check_inference(live)
            if draw.random() < 0.7:
                check_gradients(live, training=draw.random() < 0.6)
                check_inference(live)
    finally:
        while live.undo:  # hooks of all modules
            live.undo.pop()()


@pytest.mark.parametrize("number", range(100))
def test_a_sequence_of_changes_is_followed(number):
    follow(number)


@pytest.mark.prove
@pytest.mark.parametrize("number", range(100, 1000))
def test_many_sequences_of_changes_are_followed(number):
    follow(number)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", VALUES, ids=lambda change: change.__name__)
def test_every_change_of_values_is_one_and_is_followed_by_compiled_code(name, change):
    live = make_live(name)
    with torch.no_grad(), native():
        before = live.model(live.x)
    try:
        change(live)
    except Inapplicable:
        assert change.__name__ == "write_buffers"
        return
    check_inference(live)
    check_gradients(live, training=True)
    with torch.no_grad():
        assert (live.model(live.x) - before).abs().max() > 1e-4 * before.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_functional_call_count_for_the_call_alone(name):
    live = make_live(name)
    weights = {key: live.fresh(value) for key, value in live.model.named_parameters()}
    for _ in range(2):
        check_inference(live, lambda x: functional_call(live.model, weights, (x,)))
        check_inference(live)


class Stale(FusedLinear):
    """Keeps a copy of its weight from the first call on."""

    def forward(self, x):
        if current_backend("linear") == "reference" or torch.is_grad_enabled():
            return super().forward(x)
        self.__dict__.setdefault("kept", self.weight.detach().clone())
        return nn.functional.linear(x, self.kept, self.bias)


@pytest.mark.parametrize("change", VALUES, ids=lambda change: change.__name__)
def test_a_module_that_keeps_something_of_its_weight_would_be_noticed(change):
    live = Live(Stale(256, 256).double(), torch.randn(64, 256, dtype=torch.float64), 0)
    check_inference(live)
    try:
        change(live)
    except Inapplicable:
        return
    with pytest.raises(AssertionError):
        check_inference(live)
