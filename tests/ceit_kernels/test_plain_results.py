"""Fused modules follow their weights however these change, take what plain modules take, and give results away."""

import copy
import itertools

import numpy
import pytest
import torch
from support.fused_modules import assert_same, every_module, make_pair, native, step
from torch import nn

from ceit_kernels import use_backend

OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


def scaled(tensor):
    return tensor.detach() * 1.3 + 0.01


def through_data(module, name, tensor):
    tensor.data.copy_(scaled(tensor))


def through_numpy(module, name, tensor):
    numpy.copyto(tensor.detach().numpy(), scaled(tensor).numpy())


def through_an_alias(module, name, tensor):
    alias = torch.from_dlpack(tensor.detach())
    alias.copy_(scaled(tensor))


def by_a_new_parameter(module, name, tensor):
    setattr(module, name, None)
    setattr(module, name, nn.Parameter(scaled(tensor)))


def by_assignment_of_data(module, name, tensor):
    tensor.data = scaled(tensor)


def by_swapping(module, name, tensor):
    torch.utils.swap_tensors(tensor, nn.Parameter(scaled(tensor)))


def by_assigning_a_state_dict(module, name, tensor):
    module.load_state_dict({**module.state_dict(), name: scaled(tensor)}, assign=True)


WAYS = (
    through_data, through_numpy, through_an_alias, by_a_new_parameter, by_assignment_of_data, by_swapping,
    by_assigning_a_state_dict,
)  # fmt: skip


def assert_follows(module, x):
    """Fused as by the reference, at inference and in training."""
    for training in (False, True):
        copied = copy.deepcopy(module.train(training))
        with use_backend("reference"):
            expected = step(copied, x)
        with native():
            assert_same(step(copy.deepcopy(module), x), expected)
    module.eval()
    with torch.no_grad():
        with use_backend("reference"):
            expected = module(x)
        with native():
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@every_module
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_weight_that_changes_in_any_way_is_followed(name, way):
    _, module, x = make_pair(name, training=False)
    with torch.no_grad():
        module(x)
    for owner in list(module.modules()):
        for key in list(owner._parameters):
            if owner._parameters[key] is not None:
                way(owner, key, owner._parameters[key])
                assert_follows(module, x)


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", ["fused", "foreach"])
@every_module
def test_evaluation_follows_every_optimizer(name, make, how):
    _, module, x = make_pair(name)
    optimizer = make(module.parameters(), lr=3e-2, **{how: True})
    for _ in range(3):
        module.train()
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        module.eval()
        with torch.no_grad():
            with use_backend("reference"):
                expected = module(x)
            with native():
                torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@every_module
def test_weights_that_are_passed_for_a_call_count_for_that_call(name):
    _, module, x = make_pair(name, training=False)
    with torch.no_grad():
        before = module(x)
        for _ in range(3):
            values = {key: torch.randn_like(tensor) for key, tensor in module.named_parameters()}
            with use_backend("reference"):
                expected = torch.func.functional_call(module, values, (x,))
            found = torch.func.functional_call(module, values, (x,))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            torch.testing.assert_close(module(x), before)


@every_module
@pytest.mark.parametrize("training", [False, True])
def test_a_result_may_be_written_to(name, training):
    plain, fused, x = make_pair(name, training)
    expected = step(nn.Sequential(plain, nn.ReLU(inplace=True)), x)
    with native():
        assert_same(step(nn.Sequential(fused, nn.ReLU(inplace=True)), x), expected)


def converted(module, x, dtype, norms):
    """A module in a dtype, its norms' tensors in others: parameters, running statistics."""
    module = module.to(dtype)
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.LayerNorm)):
            for (_, tensor), kind in zip(child.named_parameters(), norms[:2], strict=True):
                tensor.data = tensor.data.to(kind)
            for key, buffer in child.named_buffers():
                if buffer.dim():
                    child._buffers[key] = buffer.to(norms[2])
    return module, x.to(dtype)


@pytest.mark.parametrize("name", ["leff", "i2t", "add_norm"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_mixed_as_plain_pytorch_mixes_them(name, training, dtype):
    for norms in itertools.product((torch.bfloat16, torch.float32), repeat=3):
        plain, fused, x = make_pair(name, training)
        results = []
        for module in (plain, fused):
            try:
                module, inputs = converted(module, x, dtype, norms)
                results.append(step(module, inputs))
            except (RuntimeError, TypeError):
                results.append(None)
        expected, found = results
        assert (found is None) == (expected is None), norms
        if found is not None:
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            torch.testing.assert_close(found[0], expected[0], rtol=5e-2, atol=5e-2)
