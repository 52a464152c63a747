"""Feed-forward blocks of timm: at inference the activation is part of the first layer, all else is called."""

import copy
from unittest import mock

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import assert_equal_in_float64, grown
from timm.layers.mlp import Mlp
from timm.models.tiny_vit import NormMlp
from torch import nn
from torch.nn.utils import parametrizations

from ceit_kernels import explain, freeze, fuse, use_backend
from ceit_kernels.adapters import timm_mlp

MODULES = {
    "Mlp": lambda: Mlp(64, 144, 24),
    "Mlp with a norm": lambda: Mlp(64, 144, norm_layer=nn.LayerNorm, act_layer=nn.ReLU),
    "Mlp without a bias": lambda: Mlp(64, 144, bias=False, act_layer=nn.Tanh),
    "Mlp of a GELU by tanh": lambda: Mlp(64, 144, act_layer=lambda: nn.GELU("tanh")),
    "NormMlp": lambda: NormMlp(64, 144),
}
modules = pytest.mark.parametrize("name", MODULES)


def make(name, draw=0, dtype=torch.float64):
    module = grown(MODULES[name](), draw).to(dtype).eval()
    return module, torch.randn(2, 120, 64, generator=torch.Generator().manual_seed(draw), dtype=torch.float64).to(dtype)


def calls_of(module, x):
    with mock.patch.object(timm_mlp, "linear_activation", wraps=timm_mlp.linear_activation) as calls:
        return module(x), calls.call_count


@torch.no_grad()
@modules
def test_computes_what_the_module_does(name):
    module, x = make(name)
    for layout in (x, x.transpose(0, 1), x.unflatten(1, (10, 12))):
        out, calls = calls_of(fuse(copy.deepcopy(module)), layout)
        torch.testing.assert_close(out, module(layout), rtol=1e-10, atol=1e-10)
        assert calls == (name != "Mlp without a bias")  # whose activation the kernels do not have
        torch.testing.assert_close(freeze(module)(layout), module(layout), rtol=1e-10, atol=1e-10)
    few = x[:, :3]
    out, calls = calls_of(fuse(copy.deepcopy(module)), few)
    torch.testing.assert_close(out, module(few), rtol=1e-10, atol=1e-10)
    assert calls == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@modules
def test_is_as_accurate_as_the_module(name, dtype):
    def results(draw):
        module, x = make(name, draw, dtype)
        exact = copy.deepcopy(module).double()(x.double())
        return [fuse(copy.deepcopy(module))(x)], [module(x)], [exact]

    assert_as_accurate_over_draws([name], map(results, range(8)))


@modules
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_modules_own(name, training):
    module, x = make(name)
    assert_equal_in_float64(module.train(training), [x], backend="auto")


@modules
def test_a_second_layer_is_trained_behind_one_that_is_not(name):
    module, x = make(name)
    module.fc1.requires_grad_(False)
    fused = fuse(copy.deepcopy(module))
    _, calls = calls_of(fused, x)
    assert calls == (name != "Mlp without a bias" and name != "NormMlp")  # whose norm ahead of it is trained
    for each in (module, fused):
        each(x).square().sum().backward()
    torch.testing.assert_close(fused.fc2.weight.grad, module.fc2.weight.grad, rtol=1e-9, atol=1e-9)


def with_a_hook(module):
    module.fc1.register_forward_hook(lambda part, given, out: 2 * out)


def with_a_hook_of_the_activation(module):
    module.act.register_forward_hook(lambda part, given, out: 2 * out)


def with_another_forward(module):
    module.fc1.forward = lambda x: torch.sin(x @ module.fc1.weight.t())


def with_a_parametrization(module):
    parametrizations.spectral_norm(module.fc1)


def with_a_dropout(module):
    module.drop1 = nn.Threshold(0.3, -1.0)


def with_a_hook_of_the_second_layer(module):
    module.fc2.register_forward_pre_hook(lambda part, given: (given[0] + 1,))


def with_other_weights(module):
    module.fc1.weight.data.mul_(-1.5)
    module.fc1.bias.data.add_(1)


CHANGES = {
    with_a_hook: 0,
    with_a_hook_of_the_activation: 0,
    with_another_forward: 0,
    with_a_parametrization: 0,
    with_a_dropout: 1,
    with_a_hook_of_the_second_layer: 1,
    with_other_weights: 1,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_done_to_the_parts_is_honoured(change):
    torch.manual_seed(0)
    module, x = make("Mlp")
    before, fused = module(x), fuse(copy.deepcopy(module))
    change(module)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = module(x)
    fused(x)
    fused.load_state_dict(module.state_dict(), strict=False)
    if change is with_a_parametrization:
        fused = fuse(copy.deepcopy(module))
    elif change is not with_other_weights:
        change(fused)
    out, calls = calls_of(fused, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out - before).abs().max() > 1e-4
    assert calls == CHANGES[change]
    assert (explain(fused)[0].backend == "plain") == (CHANGES[change] == 0)


@torch.no_grad()
def test_other_calls_take_the_modules_own():
    module, x = make("Mlp", dtype=torch.float32)
    fused = fuse(copy.deepcopy(module))
    with torch.autocast("cpu", torch.bfloat16):
        out, calls = calls_of(fused, x)
        torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.05)
        assert not calls
    with use_backend("linear=reference"):
        assert torch.equal(fused(x), module(x))
    rows, calls = calls_of(torch.vmap(fused), x)
    torch.testing.assert_close(rows, module(x))
    assert not calls
    images = fuse(Mlp(64, 144, use_conv=True))
    assert explain(images)[0].reason == "the kernels take Linear or FusedLinear for fc1, not Conv2d"
    assert images(x.view(2, 64, 10, 12)).shape == (2, 64, 10, 12)
