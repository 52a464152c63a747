"""Which modules are one compiled call, and why others are none."""

from functools import partial
from operator import attrgetter

import pytest
import torch
import transformers
from support.adapters import grown
from timm.layers import SEModule
from timm.models import efficientformer_v2, pvt_v2, tiny_vit
from timm.models._efficientnet_blocks import ConvBnAct
from torch import nn
from torchvision.models import mobilenetv2
from torchvision.ops import SqueezeExcitation
from transformers import SegformerConfig
from transformers.models.segformer import modeling_segformer

from ceit_kernels import freeze
from ceit_kernels.convnet import FrozenConvnet
from ceit_kernels.convnet.layers import steps_of
from ceit_kernels.convnet.steps import NotConvolutions

of = nn.Sequential
point = partial(nn.Conv2d, kernel_size=1)
shortcut = partial(ConvBnAct, 8, 8, 3, skip=True)
upsample = partial(nn.Upsample, scale_factor=2, mode="bilinear")
attention = partial(efficientformer_v2.Attention2d, 8, key_dim=4, num_heads=2, resolution=4)
queries = partial(efficientformer_v2.LocalGlobalQuery, 8, 12)
window = partial(tiny_vit.TinyVitBlock, 8, 2, window_size=2)
pvt_stage = partial(pvt_v2.PyramidVisionTransformerStage, 8, 8, 1, num_heads=2, sr_ratio=2)


def segformer():
    if transformers.__version__.startswith("4."):
        pytest.skip("in transformers 4 it is of other parts, and stays plain")
    sizes = {"num_attention_heads": [2], "mlp_ratios": [2], "patch_sizes": [3], "strides": [2]}
    config = SegformerConfig(**sizes, num_channels=8, hidden_sizes=[8], depths=[1], num_encoder_blocks=1, sr_ratios=[2])
    config._attn_implementation = "sdpa"
    return modeling_segformer.SegformerStage(config, 0, [0.0])


def changed(make, path="", **attributes):
    """A module in which attributes of a child are others."""
    module = make()
    part = attrgetter(path)(module) if path else module
    for name, value in attributes.items():
        setattr(part, name, value)
    return module


def hooked(module, path=""):
    module.get_submodule(path).register_forward_hook(lambda *_: None)
    return module


def residual(*layers):
    """The layers with a shortcut around them."""
    return changed(lambda: mobilenetv2.InvertedResidual(8, 8, 1, 1), conv=of(*layers))


def gated(gate, *behind):
    return of(point(8, 8), gate, *behind)


def gate(**children):
    return gated(changed(lambda: SqueezeExcitation(8, 4), **children), point(8, 8))


class OwnAttention(tiny_vit.Attention):
    """A subclass, of which nothing is known."""


KNOWN = {
    "a gate ahead of a pointwise layer": gate,
    "a gate of one pixel by another name": lambda: gate(avgpool=nn.AdaptiveAvgPool2d((1, 1))),
    "an activation behind a shortcut's own": lambda: of(shortcut(), nn.ReLU()),
    "bilinear upsampling": lambda: of(point(8, 8), upsample(), nn.ReLU()),
    "a square stride": lambda: of(nn.Conv2d(8, 8, 5, stride=(2, 2), padding=(2, 2), groups=8)),
    "attention": attention,
    "attention of a smaller image": lambda: attention(stride=2),
    "queries of every second pixel": lambda: changed(
        queries, "pool", kernel_size=(1, 1), stride=(2, 2), padding=(0, 0)
    ),
    "children that do nothing": lambda: changed(queries, more=nn.Dropout(0.5), none=None),
    "PVTv2": pvt_stage,
    "SegFormer": segformer,
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
@torch.no_grad()
def test_is_one_call(make):
    module = grown(make())
    module.train(False)
    frozen, x = freeze(module), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert isinstance(frozen.model, FrozenConvnet)
    torch.testing.assert_close(frozen(x), module(x), rtol=1e-9, atol=1e-9)


NOT = "the kernels take {} for {}, not {}".format
NO_CONVOLUTION = "no convolution comes right before {}".format
OTHER = {
    # What a call of a part would show.
    "a hook": (lambda: of(hooked(point(8, 8)), nn.ReLU()), "the module.0 has a hook"),
    "a forward of its own": (
        lambda: of(changed(lambda: point(8, 8), forward=abs)),
        "the module.0 has a forward of its own",
    ),
    "another class": (lambda: of(point(8, 8), nn.Tanh()), "the module.1 is a Tanh"),
    "another child": (lambda: changed(queries, more=nn.ReLU()), "the module has more"),
    "a parameter": (lambda: changed(queries, own=nn.Parameter(torch.ones(1))), "the module has own of its own"),
    "a buffer": (lambda: changed(shortcut, own=nn.Buffer(torch.ones(1))), "the module has own of its own"),
    # Convolutions that the kernels lack.
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=4), "the module has groups=4, side 3 and stride 1"),
    "multiplied channels": (lambda: nn.Conv2d(8, 16, 3, groups=8), "the module has groups=8, side 3 and stride 1"),
    "wide depthwise": (lambda: nn.Conv2d(8, 8, 9, groups=8), "the module has groups=8, side 9 and stride 1"),
    "far depthwise": (lambda: nn.Conv2d(8, 8, 3, 3, groups=8), "the module has groups=8, side 3 and stride 3"),
    "two sides": (lambda: nn.Conv2d(8, 8, (3, 5)), "the module is not the same in both directions"),
    "two strides": (lambda: nn.Conv2d(8, 8, 3, (1, 2)), "the module is not the same in both directions"),
    "two paddings": (lambda: nn.Conv2d(8, 8, 3, 1, (1, 0)), "the module is not the same in both directions"),
    "padding in words": (lambda: nn.Conv2d(8, 8, 3, padding="same"), "the module is not the same in both directions"),
    "dilation": (lambda: nn.Conv2d(8, 8, 3, dilation=(1, 2)), "the module has dilation=(1, 2), padding_mode=zeros"),
    "around": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        "the module has dilation=(1, 1), padding_mode=circular",
    ),
    # Layers that do not fit.
    "channels": (lambda: of(point(8, 8), point(9, 8)), "the module.1 takes 9 channels of other tensors than it gets"),
    "tokens": (
        lambda: of(nn.Linear(8, 8), point(8, 8)),
        "the module.1 takes 8 channels of other tensors than it gets",
    ),
    "tokens of an image": (
        lambda: pvt_v2.MlpWithDepthwiseConv(8, 16),
        "the module takes tokens without saying of what image",
    ),
    "tokens made": (pvt_v2.OverlapPatchEmbed, "the module takes tokens without saying of what image"),
    # Norms, activations and shortcuts.
    "norm of the batch": (
        lambda: of(point(8, 8), nn.BatchNorm2d(8, track_running_stats=False)),
        "the module.1 takes statistics of the batch",
    ),
    "norm in training": (
        lambda: of(point(8, 8), changed(lambda: nn.BatchNorm2d(8), train=lambda mode: None)),
        "the module.1 takes statistics of the batch",
    ),
    "norm of images": (lambda: of(nn.Linear(8, 8), nn.LayerNorm((4, 8))), "the module.1 is no norm of channels"),
    "norm first": (lambda: of(nn.BatchNorm2d(8), point(8, 8)), NO_CONVOLUTION("the module.0")),
    "norm of another reader's": (
        lambda: of(point(8, 8), residual(nn.BatchNorm2d(8), point(8, 8))),
        NO_CONVOLUTION("the module.1.conv.0"),
    ),
    "norm behind an activation": (
        lambda: of(point(8, 8), nn.ReLU(), nn.BatchNorm2d(8)),
        "the module.2 follows an activation or a shortcut",
    ),
    "norm behind a shortcut": (
        lambda: of(residual(point(8, 8)), nn.BatchNorm2d(8)),
        "the module.1 follows an activation or a shortcut",
    ),
    "two activations": (lambda: of(point(8, 8), nn.ReLU(), nn.SiLU()), "the module.2 follows an activation"),
    "two behind a shortcut": (lambda: of(shortcut(), nn.ReLU(), nn.SiLU()), "the module.2 follows an activation"),
    "two behind upsampling": (
        lambda: of(point(8, 8), upsample(), nn.ReLU(), nn.SiLU()),
        NO_CONVOLUTION("the module.3"),
    ),
    "two shortcuts": (
        lambda: residual(shortcut()),
        "the shortcut of the module ends behind another one, or has other channels",
    ),
    "shortcut of other channels": (
        lambda: changed(lambda: ConvBnAct(8, 1, 3), has_skip=True),
        "the shortcut of the module ends behind another one, or has other channels",
    ),
    # Upsampling.
    **{
        f"upsampling, {name}": (
            lambda options=options: of(point(8, 8), upsample(**options)),
            "the module.1 is not bilinear by a whole factor",
        )
        for name, options in {
            "nearest": {"mode": "nearest"},
            "one and a half": {"scale_factor": 1.5},
            "two factors": {"scale_factor": (2.0, 2.0)},
            "to a size": {"scale_factor": None, "size": 8},
            "corners": {"align_corners": True},
        }.items()
    },
    "upsampling first": (lambda: of(upsample(), point(8, 8)), "the module.0 is not bilinear by a whole factor"),
    "upsampling of tokens": (
        lambda: of(nn.Linear(8, 8), upsample()),
        "the module.1 is not bilinear by a whole factor",
    ),
    "upsampling of a gate": (
        lambda: gated(SEModule(8), upsample()),
        "a gate has no convolution behind it",
    ),
    # Gates.
    "gate at the end": (lambda: gated(SEModule(8)), "the module ends with a gate"),
    "gate ahead of neighbours": (
        lambda: gated(SEModule(8), nn.Conv2d(8, 8, 3)),
        "the module.2 follows a gate and is not pointwise",
    ),
    "gate ahead of a norm": (lambda: gated(SEModule(8), nn.BatchNorm2d(8)), "the module.2 follows a gate"),
    "gate first": (lambda: of(SEModule(8), point(8, 8)), NO_CONVOLUTION("the module.0")),
    "another gate": (
        lambda: gate(scale_activation=nn.Tanh()),
        NOT("Sigmoid or Hardsigmoid or HardSigmoid", "the gate", "Tanh"),
    ),
    "another pooling": (
        lambda: gate(avgpool=nn.AdaptiveMaxPool2d(1)),
        NOT("AdaptiveAvgPool2d", "the pooling", "AdaptiveMaxPool2d"),
    ),
    "pooling to four": (
        lambda: gate(avgpool=nn.AdaptiveAvgPool2d(2)),
        "the module.1 takes more than the mean of all pixels",
    ),
    "largest pixel": (
        lambda: gated(SEModule(8, add_maxpool=True), point(8, 8)),
        "the module.1 takes more than the mean of all pixels",
    ),
    **{
        f"gate of {name}": (
            lambda layer=layer: gate(fc2=layer()),
            "the module.1 has other layers than two pointwise ones",
        )
        for name, layer in {
            "one layer": nn.Identity,
            "three layers": lambda: of(point(4, 4), point(4, 8)),
            "neighbours": lambda: nn.Conv2d(4, 8, 3, padding=1),
            "neighbours too": lambda: of(nn.Conv2d(4, 4, 3, padding=1), point(4, 8)),
        }.items()
    },
    "gate of one channel": (lambda: gate(fc2=point(4, 1)), "the module.1 does not gate the 8 channels that it gets"),
    "gate of others": (
        lambda: gate(fc1=point(4, 4), fc2=point(4, 4)),
        "the module.1 does not gate the 8 channels that it gets",
    ),
    "gate with an activation": (
        lambda: gate(fc2=of(point(4, 8), nn.ReLU())),
        "the module.1 does not gate the 8 channels that it gets",
    ),
    # Attention.
    "more heads": (
        lambda: changed(pvt_stage, "blocks.0.attn", num_heads=3),
        "the module.blocks.0.attn has more heads than channels",
    ),
    "heads mixed by neighbours": (
        lambda: changed(attention, talking_head2=nn.Conv2d(2, 2, 3, padding=1)),
        "the module.talking_head2 is not pointwise",
    ),
    "heads mixed by another class": (
        lambda: changed(attention, talking_head1=nn.Tanh()),
        NOT("Conv2d", "the module.talking_head1", "Tanh"),
    ),
    "nothing beside attention": (lambda: changed(attention, v_local=nn.Identity()), NO_CONVOLUTION("the module")),
    "windows of wider values": (
        lambda: changed(window, attn=tiny_vit.Attention(8, 4, 2, attn_ratio=2, resolution=(2, 2))),
        "the module mixes heads within windows, or has values of other channels than keys",
    ),
    "windows with a hook": (lambda: hooked(window(), "attn"), "attn has a hook"),
    "windows of a subclass": (
        lambda: changed(window, attn=OwnAttention(8, 4, 2, attn_ratio=1, resolution=(2, 2))),
        "the module.attn is no attention of TinyViT",
    ),
    "windows with another norm": (
        lambda: changed(window, "attn", norm=nn.Tanh()),
        NOT("LayerNorm", "the module.attn.norm", "Tanh"),
    ),
    "a window's attention": (lambda: tiny_vit.Attention(8, 4, 2, 1, (2, 2)), "the module is called by itself"),
    **{
        f"queries, {path} with another {name}": (
            lambda path=path, name=name, value=value: changed(queries, path, **{name: value}),
            "the module takes other pixels than every second one",
        )
        for path, name, value in [
            ("pool", "kernel_size", 2),
            ("pool", "stride", 1),
            ("pool", "padding", 1),
            ("local", "kernel_size", (5, 5)),
            ("local", "stride", (1, 1)),
            ("local", "padding", (0, 0)),
        ]
    },
    "queries, the largest pixel": (
        lambda: changed(queries, pool=nn.MaxPool2d(1, 2)),
        NOT("AvgPool2d", "pool", "MaxPool2d"),
    ),
    "queries, no convolution": (lambda: changed(queries, local=nn.AvgPool2d(2)), NOT("Conv2d", "local", "AvgPool2d")),
    "SegFormer's tokens": (lambda: changed(segformer, reshape=False), "the module gives no images"),
    "SegFormer's patches": (lambda: hooked(segformer(), "patch_embeddings"), "the module gives no images"),
    "SegFormer's own attention": (
        lambda: changed(segformer, "blocks.0.attention.config", _attn_implementation="flex_attention"),
        "the module.blocks.0.attention has an attention of its own",
    ),
}


@pytest.mark.parametrize(("make", "reason"), OTHER.values(), ids=OTHER)
def test_says_why_it_is_none(make, reason):
    module = make()
    module.train(False)
    with pytest.raises(NotConvolutions) as refused:
        steps_of(module)
    assert str(refused.value) == reason
