"""SegFormer's decode head, whose convolution is moved before the upsampling."""

import copy
import importlib
from unittest import mock

import pytest
import torch
from support.adapters import assert_accurate_in_float32, assert_equal_in_float64, grown
from torch import nn
from torch.nn.utils import parametrizations
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from ceit_kernels import explain, freeze, fuse, use_backend

CONFIG = {"decoder_hidden_size": 16, "num_labels": 5, "classifier_dropout_prob": 0.0}


class Head(nn.Module):
    """The head with each stage's map as an argument."""

    def __init__(self, seed=0, **options):
        super().__init__()
        self.head = SegformerDecodeHead(SegformerConfig(hidden_sizes=[8, 12, 16, 20], **{**CONFIG, **options}))
        grown(self, seed)

    def forward(self, *maps):
        return self.head(maps)


def make_maps(sizes=((24, 16), (12, 8), (6, 4), (3, 2)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = (8, 12, 16, 20)
    return [
        torch.randn(2, c, *s, generator=generator, dtype=torch.float64) for c, s in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize("training", [False, True])
def test_a_fused_head_computes_what_the_plain_one_does(training):
    for sizes in ({}, {"sizes": ((7, 5), (7, 5), (4, 3), (2, 2))}):
        assert_equal_in_float64(Head().train(training), make_maps(**sizes))


def test_a_fused_head_is_as_exact_in_float32():
    assert_accurate_in_float32(lambda draw: (Head(draw).eval(), make_maps(seed=draw)))


def test_the_convolution_runs_on_the_maps_own_sizes():
    module = importlib.import_module("ceit_kernels.adapters.transformers_segformer")
    head, maps = fuse(Head(), leff=False), make_maps()
    with mock.patch.object(module, "linear_layer", wraps=module.linear_layer) as calls:
        out = head(*maps)
    assert [call.args[0].shape[1] for call in calls.call_args_list] == [384, 96, 24, 6]
    assert out.stride() == Head()(*maps).stride()
    torch.testing.assert_close(freeze(Head().eval())(*maps), Head().eval()(*maps), rtol=1e-10, atol=1e-10)


def with_a_hook(head):
    head.linear_fuse.register_forward_hook(lambda module, inputs, out: 2 * out)


def parametrised(head):
    parametrizations.spectral_norm(head.linear_fuse)


def with_a_bias(head):
    head.linear_fuse = nn.Conv2d(64, 16, 1).double()


class Adapted(nn.Module):
    """An adapter in the place of a layer, which has no weight of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def adapted(head):
    head.linear_fuse = Adapted(head.linear_fuse)


def of_a_row(head):
    head.linear_fuse = nn.Conv2d(64, 16, (1, 2), bias=False).double()


def padded(head):
    head.linear_fuse.padding = (1, 1)


# And the reason for which it is called then.
CHANGES = {
    with_a_hook: "linear_fuse has a hook",
    parametrised: "the kernels take Conv2d for linear_fuse, not ParametrizedConv2d",
    with_a_bias: "linear_fuse is no pointwise convolution without a bias",
    of_a_row: "linear_fuse is no pointwise convolution without a bias",
    padded: "the kernels have padding=(0, 0) in linear_fuse, not (1, 1)",
    adapted: "the kernels take Conv2d for linear_fuse, not Adapted",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_done_to_the_convolution_is_honoured(change):
    torch.manual_seed(0)
    plain = Head().eval()
    change(plain.head)
    fused = fuse(copy.deepcopy(plain))
    assert [(row.backend, row.reason) for row in explain(fused) if row.name == "head"] == [("plain", CHANGES[change])]
    torch.testing.assert_close(fused(*make_maps()), plain(*make_maps()), rtol=1e-10, atol=1e-10)
    with use_backend("linear=reference"):
        torch.testing.assert_close(fused(*make_maps()), plain(*make_maps()), rtol=0, atol=0)
