"""SegFormer's decode head, whose convolution is moved before the upsampling."""

import copy
import importlib
from unittest import mock

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import assert_accurate_in_float32, assert_equal_in_float64, grown
from torch import nn
from torch.nn.utils import parametrizations
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from ceit_kernels import explain, freeze, fuse, use_backend
from ceit_kernels.adapters import segmentation_head

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


SIZES = [
    ((24, 16), (12, 8), (6, 4), (3, 2)),
    ((21, 10), (7, 5), (9, 3), (2, 1)),
    ((5, 7), (5, 7), (8, 11), (1, 1)),
]


def classified(head, maps):
    """The logits without gradients, and whether they are of one call."""
    module = importlib.import_module("ceit_kernels.adapters.transformers_segformer")
    found = []

    def classify_maps(*arguments):
        found.append(segmentation_head.classify_maps(*arguments))
        return found[-1]

    with torch.no_grad(), mock.patch.object(module, "classify_maps", classify_maps):
        out = head(*maps)
    return out, any(logits is not None for logits in found)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_at_inference_the_head_is_one_call(sizes):
    for options in ({}, {"decoder_hidden_size": 70, "num_labels": 130, "hidden_act": "gelu"}):
        plain, maps = Head(**options).eval(), make_maps(sizes)
        expected = plain(*maps).detach()
        for head in (fuse(copy.deepcopy(plain)), freeze(plain)):
            out, in_one_call = classified(head, maps)
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
            assert in_one_call
            assert out.stride() == expected.stride()
            channels_last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
            torch.testing.assert_close(classified(head, channels_last)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_call_is_as_exact_as_the_plain_head(dtype):
    def results(draw):
        plain, maps = Head(draw, decoder_hidden_size=64).eval().to(dtype), [x.to(dtype) for x in make_maps(seed=draw)]
        exact = copy.deepcopy(plain).double()(*(x.double() for x in maps)).detach()
        out, in_one_call = classified(fuse(copy.deepcopy(plain)), maps)
        assert in_one_call
        return [out], [plain(*maps).detach()], [exact]

    assert_as_accurate_over_draws(["logits"], map(results, range(8)))


def hooked(name):
    def change(head):
        projection = getattr(head, "linear_projections", None) or head.linear_c  # in transformers 5 and 4
        part = {"projection": projection[1], "proj": projection[1].proj}.get(name) or head.get_submodule(name)
        part.register_forward_hook(lambda module, inputs, out: 2 * out)

    change.__name__ = f"hook of {name}"
    return change


def with_another_norm(head):
    head.batch_norm = nn.InstanceNorm2d(16).double()


def with_statistics_of_the_batch(head):
    head.batch_norm.train()


def with_another_activation(head):
    head.activation = nn.Softsign()


def with_a_wide_classifier(head):
    head.classifier = nn.Conv2d(16, 5, 3, padding=1).double()


def with_a_parametrised_classifier(head):
    parametrizations.spectral_norm(head.classifier)


def with_another_projection(head):
    projections = getattr(head, "linear_projections", None) or head.linear_c
    projections[0] = Adapted(projections[0])


def with_another_forward(head):
    head.classifier.forward = lambda x: x.sin()


PARTS = ("batch_norm", "activation", "dropout", "classifier", "projection", "proj")
CALLED = [
    *map(hooked, PARTS),
    with_another_norm,
    with_statistics_of_the_batch,
    with_another_activation,
    with_a_wide_classifier,
    with_a_parametrised_classifier,
    with_another_projection,
    with_another_forward,
]


@pytest.mark.parametrize("change", CALLED, ids=lambda change: change.__name__)
def test_parts_that_are_more_than_the_call_computes_are_called(change):
    torch.manual_seed(0)
    plain, maps = Head().eval(), make_maps()
    before = plain(*maps).detach()
    change(plain.head)
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        expected = copy.deepcopy(plain)(*maps)
    out, in_one_call = classified(fused, maps)
    assert not in_one_call
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert expected.shape != before.shape or (expected - before).abs().max() > 1e-4


def test_the_call_follows_the_weights():
    plain, maps = Head().eval(), make_maps()
    fused = fuse(copy.deepcopy(plain))
    before = classified(fused, maps)[0]
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if not tensor.is_floating_point():
            continue
        for each in (plain, fused):
            changed = each.get_parameter(name) if name in dict(each.named_parameters()) else each.get_buffer(name)
            changed.data.mul_(1.25).add_(0.01)
        out, in_one_call = classified(fused, maps)
        assert in_one_call, name
        torch.testing.assert_close(out, plain(*maps).detach(), rtol=1e-10, atol=1e-10)
        assert (out - before).abs().max() > 1e-6, name
        before = out


def test_a_backbone_of_many_stages_is_left_to_pytorch():
    config = {"num_encoder_blocks": 9, "hidden_sizes": [4] * 9}
    head = grown(SegformerDecodeHead(SegformerConfig(**{**CONFIG, **config}))).eval()
    maps = [torch.randn(1, 4, 6, 6, dtype=torch.float64) for _ in range(9)]
    expected = head(maps).detach()
    with torch.no_grad():
        torch.testing.assert_close(fuse(copy.deepcopy(head))(maps), expected, rtol=1e-10, atol=1e-10)
