"""FLOP formulas of the registered operators against what PyTorch counts for the plain modules."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ceit_kernels import add_layer_norm, leff_block, self_attention, use_backend
from ceit_kernels.i2t import Image2Tokens
from ceit_kernels.leff import LocallyEnhancedFeedForward
from ceit_kernels.leff.norms import of_module

OPERATORS = (
    "leff_inference", "leff", "leff_backward", "lca", "lca_backward", "i2t", "i2t_backward",
    "linear", "linear_backward", "attention", "attention_backward", "add_norm",
    "add_norm_backward",
)  # fmt: skip


def counted(function):
    """FLOPs of a forward, and of it with a backward pass, with the names of the operators that were counted."""
    with FlopCounterMode(display=False) as forward:
        out = function()
    with FlopCounterMode(display=False) as both:
        function().sum().backward()
    assert out is not None
    names = {str(operator) for operator in both.get_flop_counts()["Global"]}
    return forward.get_total_flops(), both.get_total_flops(), names


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_formula(name):
    assert getattr(torch.ops.ceit, name) in flop_registry


@pytest.mark.parametrize("need_input", [False, True])
def test_leff_counts_its_convolutions(need_input):
    plain, x = LocallyEnhancedFeedForward(16, 32), torch.randn(2, 17, 16, requires_grad=need_input)
    convolutions = (plain.conv1, plain.conv2, plain.conv3)
    weights, biases = [c.weight for c in convolutions], [c.bias for c in convolutions]
    norms = [of_module(norm) for norm in (plain.bn1, plain.bn2, plain.bn3)]

    def fused():
        with use_backend("leff=native"):
            return leff_block(x, weights, biases, norms, num_prefix_tokens=1)

    *expected, _ = counted(lambda: plain(x))
    *found, names = counted(fused)
    assert found == expected
    assert names == {"ceit.leff", "ceit.leff_backward"}


def test_leff_at_inference_counts_its_convolutions():
    plain, x = LocallyEnhancedFeedForward(16, 32, with_bn=False), torch.randn(2, 17, 16)
    convolutions = (plain.conv1, plain.conv2, plain.conv3)
    with torch.no_grad(), FlopCounterMode(display=False) as expected:
        plain(x)
    with torch.no_grad(), use_backend("leff=native"), FlopCounterMode(display=False) as found:
        leff_block(x, [c.weight for c in convolutions], [c.bias for c in convolutions], num_prefix_tokens=1)
    assert found.get_total_flops() == expected.get_total_flops() > 0
    assert [str(operator) for operator in found.get_flop_counts()["Global"]] == ["ceit.leff_inference"]


@pytest.mark.parametrize("need_input", [False, True])
def test_the_stem_counts_its_convolution(need_input):
    plain, x = Image2Tokens(), torch.randn(2, 3, 18, 23, requires_grad=need_input)
    weight, bn = plain.conv.weight, plain.bn
    arguments = (x, weight, bn.weight, bn.bias, None, None, bn.eps, True, None, None, "native")
    *expected, _ = counted(lambda: plain(x))
    *found, names = counted(lambda: torch.ops.ceit.i2t(*arguments)[0])
    assert found == expected
    assert names == {"ceit.i2t", "ceit.i2t_backward"}


@pytest.mark.parametrize("need_input", [False, True])
def test_a_linear_layer_counts_its_products(need_input):
    x, weight = torch.randn(3, 5, 8, requires_grad=need_input), torch.randn(12, 8, requires_grad=True)
    *expected, _ = counted(lambda: F.linear(x, weight))
    *found, names = counted(lambda: torch.ops.ceit.linear(x, weight, None, None, "native"))
    assert found == expected
    assert names == {"ceit.linear", "ceit.linear_backward"}


@pytest.mark.parametrize("num_queries", [7, 2])
def test_attention_counts_what_pytorch_counts_for_flash_attention(num_queries):
    qkv = torch.randn(2, 7, 48, requires_grad=True)
    query, key = (2, 4, num_queries, 4), (2, 4, 7, 4)

    def fused():
        with use_backend("attention=native"):
            return self_attention(qkv, num_heads=4, num_queries=num_queries)

    forward, both, names = counted(fused)
    assert forward == flop_counter.sdpa_flop_count(query, key, key)
    assert both - forward == flop_counter.sdpa_backward_flop_count(query, query, key, key)
    assert names == {"ceit.attention", "ceit.attention_backward"}


def test_class_token_attention_counts_what_it_computes():
    """Three products of all channels, and two of the class tokens with one vector a head, of which PyTorch has more."""
    batch, layers, heads, channels = 3, 5, 2, 16
    formula = flop_registry[torch.ops.ceit.lca]
    x, weight = torch.empty(batch, layers, channels), torch.empty(3 * channels, channels)
    grad = torch.empty(batch, 1, channels)
    flops = formula(x, weight, None, None, heads, 1.0, 0.0, False, None, "triton", out_val=grad)
    assert flops == 2 * batch * channels * (3 * channels + 2 * heads * layers)
    backward = flop_registry[torch.ops.ceit.lca_backward]
    found = [
        backward(grad, x, weight, *(None,) * 6, heads, 1.0, 0.0, None, *needs, "triton", out_val=None)
        for needs in ((True, True), (True, False), (False, True))
    ]
    assert found[0] > found[1] == found[2] > flops


def test_a_norm_counts_nothing_as_in_pytorch():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8)

    def fused():
        with use_backend("add_norm=native"):
            return add_layer_norm(x, x, weight)[1]

    forward, both, _ = counted(fused)
    assert forward == both == 0
