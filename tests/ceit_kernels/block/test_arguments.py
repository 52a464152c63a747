"""When one compiled call may stand for several layers: each of the things that have to hold."""

import pytest
import torch
from torch import nn

from ceit_kernels import FusedAttention, FusedLCAAttention, FusedLinear, use_backend
from ceit_kernels.block.arguments import are_readable, attention_tensors, can_run_fused, is_idle, linear_tensors

OPERATORS = ("linear", "attention")
X = torch.randn(2, 3, 8)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("dropout", "idle"),
    [
        (nn.Identity().eval(), True),
        (nn.Dropout(0.5).eval(), True),
        (nn.Dropout(0.5), False),
        (nn.Dropout(0.0), True),
        (nn.Dropout1d(0.5).eval(), False),
        (hooked(nn.Identity().eval()), False),
    ],
    ids=str,
)
def test_a_dropout_is_left_out_where_it_does_nothing(dropout, idle):
    assert is_idle(dropout) == idle


@pytest.mark.parametrize(
    ("dtype", "tensors", "readable"),
    [
        (torch.float32, [torch.ones(2, 2), None, torch.ones(2)], True),
        (torch.float32, [torch.ones(2, dtype=torch.float64)], False),
        (torch.bfloat16, [torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2)], True),
        (torch.bfloat16, [torch.ones(2, 2)], False),
        (torch.bfloat16, [torch.ones(2, dtype=torch.float16)], False),
        (torch.float32, [torch.ones(2, device="meta")], False),
        (torch.float32, [torch.ones(2), torch.ones(2).to_sparse()], False),
    ],
)
def test_parameters_are_of_the_inputs_kind_or_vectors_in_float32(dtype, tensors, readable):
    assert are_readable(X.to(dtype), tensors) == readable


@torch.no_grad()
def test_a_call_is_one_where_nothing_else_would_see_its_parts():
    assert can_run_fused(X, 3, OPERATORS)
    assert not can_run_fused(X, 4, OPERATORS)
    assert not can_run_fused(X[:0], 3, OPERATORS)
    assert not can_run_fused(X.half(), 3, OPERATORS)
    assert not can_run_fused(X.to("meta"), 3, OPERATORS)
    assert not can_run_fused(X, 3, OPERATORS, torch.bfloat16)
    with torch.enable_grad():
        assert not can_run_fused(X, 3, OPERATORS)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_run_fused(X, 3, OPERATORS)
        assert can_run_fused(X, 3, OPERATORS, torch.bfloat16)
    with use_backend("attention=reference"):
        assert not can_run_fused(X, 3, OPERATORS)
        assert can_run_fused(X, 3, OPERATORS[:1])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not can_run_fused(X, 3, OPERATORS)
    finally:
        handle.remove()


def test_a_linear_layer_is_read_where_it_is_one_of_these_sizes():
    for layer in (nn.Linear(8, 4), FusedLinear(8, 4, bias=False)):
        assert linear_tensors(layer, 4, 8) == [layer.weight, layer.bias]
        assert linear_tensors(layer, 8, 4) is None
    assert linear_tensors(hooked(nn.Linear(8, 4)), 4, 8) is None
    assert linear_tensors(nn.Conv1d(8, 4, 1), 4, 8) is None


def test_an_attention_is_read_where_all_around_it_is_what_it_seems():
    def parts(**changes):
        found = {"norm1": nn.LayerNorm(8, eps=1e-3), "attention": FusedAttention(8, 2).eval(), "norm2": nn.LayerNorm(8)}
        return {**found, **changes}

    good = parts()
    norm1, attention, norm2 = good.values()
    layers = norm1, attention.qkv, attention.proj, norm2
    tensors, scalars = attention_tensors(**good, kind=FusedAttention, channels=8)
    assert [id(t) for t in tensors] == [id(t) for layer in layers for t in (layer.weight, layer.bias)]
    assert scalars == [1e-3, 0.5, 1e-5]
    assert attention_tensors(**good, kind=FusedAttention, channels=4) is None
    assert attention_tensors(**good, kind=FusedLCAAttention, channels=8) is None
    odd = FusedAttention(8, 2)
    odd.proj = nn.Linear(8, 4)
    for name, module in (
        ("norm1", nn.GroupNorm(1, 8)),
        ("norm1", hooked(nn.LayerNorm(8))),
        ("norm2", nn.LayerNorm((3, 8))),
        ("attention", FusedAttention(8, 2, proj_drop=0.5)),
        ("attention", nn.Identity()),
        ("attention", odd),
    ):
        assert attention_tensors(**parts(**{name: module}), kind=FusedAttention, channels=8) is None, name
