"""Mix-FFN of SegFormer, GLPN and PVTv2, of transformers and of timm, through ``fuse``."""

import copy
from functools import cache

import pytest
import torch
from support.adapters import assert_accurate_in_float32, assert_equal_in_float64, grown
from timm.models.pvt_v2 import MlpWithDepthwiseConv

from ceit_kernels import fuse, use_backend

# The class, how it is configured, and how the first layers and the wrapped convolution are called.
BLOCKS = ("segformer", "glpn", "pvt_v2", "pvt_v2 linear", "timm", "timm linear")


@cache
def transformers_models():
    from transformers import GLPNConfig, PvtV2Config, SegformerConfig
    from transformers.models.glpn import modeling_glpn as glpn
    from transformers.models.pvt_v2 import modeling_pvt_v2 as pvt_v2
    from transformers.models.segformer import modeling_segformer as segformer

    mix_ffn = getattr(segformer, "SegformerMixMLP", None) or segformer.SegformerMixFFN
    return {
        "segformer": lambda **o: mix_ffn(SegformerConfig(**o), 12, 40, 20),
        "glpn": lambda **o: glpn.GLPNMixFFN(GLPNConfig(**o), 12, 40, 20),
        "pvt_v2": lambda **o: pvt_v2.PvtV2ConvFeedForwardNetwork(PvtV2Config(**o), 12, 40, 20),
        "pvt_v2 linear": lambda **o: pvt_v2.PvtV2ConvFeedForwardNetwork(
            PvtV2Config(linear_attention=True, **o), 12, 40
        ),
    }


def make_block(name, seed=0, dropout=0.0):
    if name.startswith("timm"):
        block = MlpWithDepthwiseConv(12, 40, 20, drop=dropout, extra_relu=name == "timm linear")
    else:
        block = transformers_models()[name](hidden_dropout_prob=dropout)
    return grown(block, seed)


def make_inputs(name, batch=2, height=5, width=7, seed=0):
    x = torch.randn(batch, height * width, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x, [height, width]) if name.startswith("timm") else (x, height, width)


blocks = pytest.mark.parametrize("name", BLOCKS)


@blocks
def test_a_fused_block_computes_what_the_plain_one_does(name):
    for size in ({}, {"batch": 1, "height": 1, "width": 13}):
        for training in (False, True):
            assert_equal_in_float64(make_block(name).train(training), make_inputs(name, **size))
    assert_accurate_in_float32(lambda draw: (make_block(name, draw), make_inputs(name, seed=draw)))


@blocks
def test_dropout_in_training_takes_the_plain_path(name):
    plain = make_block(name, dropout=0.5).train()
    fused, inputs = fuse(copy.deepcopy(plain)), make_inputs(name)
    assert "dropout" in fused.plain_reason()
    results = []
    for block in (plain, fused):
        torch.manual_seed(0)
        results.append(block(*inputs))
    torch.testing.assert_close(*results)
    with use_backend("leff=native"):
        fused.eval()(*inputs)
