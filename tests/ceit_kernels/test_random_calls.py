"""Random calls of every fused operator and of whole models are as right as plain PyTorch's."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from support.random_calls import OPERATORS, Call, FirstQueries, LeFF, Normed, calls
from torch import nn

from ceit_kernels.i2t import Image2Tokens
from ceit_kernels.lca import LCAAttention

MANY = {
    "leff": 200, "lca": 400, "i2t": 250, "add_norm": 250, "attention": 340, "linear": 300, "patches": 200, "model": 60,
}  # fmt: skip


def check_calls(operator, number):
    @settings(max_examples=number, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls(operator))
    def check(call):
        call.check()

    check()


_BF16, _LCA = torch.bfloat16, {"dim": 48, "num_heads": 3}
_ONE_CHANNEL = {"grid": (2, 6), "in_features": 1, "hidden_features": 1, "out_features": 1, "act_layer": nn.SiLU}
_FEW_PLACES = {"grid": (2, 2), "in_features": 18, "hidden_features": 45}
_LARGE_SCORES = {"queries": None, "dim": 7, "num_heads": 1, "qkv_bias": True}
_ONE_PRODUCT = {"queries": None, "dim": 1, "num_heads": 1, "qkv_bias": True}
_TAIL = {
    "grid": (1, 5), "in_features": 22, "hidden_features": 1, "out_features": 1, "kernel_size": 7, "with_bn": False,
    "num_prefix_tokens": 0, "bias": False, "first_act": False,
}  # fmt: skip
# Kinds of calls that were less right once.
KINDS = {
    "tokens far from zero": Call(LCAAttention, _LCA, ((20, 12, 48),), _BF16, mean=100.0),
    "tokens all the same in LCA": Call(LCAAttention, _LCA, ((20, 18, 48),), _BF16, mean=1e4, size=1e-2),
    "tokens all the same": Call(
        FirstQueries, {"queries": None, "dim": 4, "num_heads": 4}, ((1, 121, 4),), _BF16, mean=1e3, size=1e-2
    ),
    "rows all the same": Call(
        Normed, {"channels": 47, "affine": True, "prefix": None}, ((6, 21, 47),) * 2, _BF16, mean=1e4, size=30.0
    ),
    "images all the same": Call(
        Image2Tokens, {"in_chans": 3, "out_chans": 8}, ((2, 3, 1, 1),), _BF16, mean=1e3, size=1e-2
    ),
    "scores of a million": Call(FirstQueries, _LARGE_SCORES, ((2, 132, 7),), _BF16, mode="eval", mean=1e3),
    "one weight of a row": Call(
        FirstQueries, _ONE_PRODUCT, ((1, 118, 1),), torch.float32, mode="eval", size=30.0, threads=2
    ),
    "batch statistics of four places": Call(
        LeFF, _FEW_PLACES, ((1, 5, 18),), torch.float32, autocast=True, mode="train", norms="fbb"
    ),
    "values of almost nothing": Call(
        LeFF, _TAIL, ((1, 5, 22),), torch.float32, autocast=True, view="expanded", mean=1e4, size=1e-2
    ),
    "slopes of almost nothing": Call(LeFF, _ONE_CHANNEL, ((1, 13, 1),), torch.float32, mode="eval", mean=1e3, bias=1e4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_magnify_roundings_are_as_right_as_plain_pytorchs(kind):
    KINDS[kind].check()


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_calls_are_as_right_as_plain_pytorchs(operator):
    check_calls(operator, MANY[operator] // 25)


@pytest.mark.prove
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_random_calls_are_as_right_as_plain_pytorchs(operator):
    check_calls(operator, MANY[operator])
