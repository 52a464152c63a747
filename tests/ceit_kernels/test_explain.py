"""``explain``: what is fused, by what, and why the rest is not."""

import re

import pytest
import torch
from support.fused_modules import make_pair
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn
from torch.nn.utils import parametrizations

from ceit_kernels import explain, freeze, fuse, unfuse, use_backend
from ceit_kernels.leff import LocallyEnhancedFeedForward


def depthwise(channels=8, **options):
    return nn.Conv2d(channels, channels, 3, groups=channels, **{"padding": 1, **options})


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.mix, self.contract = nn.Conv2d(4, 16, 1), depthwise(16), nn.Conv2d(8, 4, 1)


class Squeezed(nn.Module):
    class SqueezeExcite(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def __init__(self):
        super().__init__()
        self.expand, self.mix, self.se, self.contract = (
            nn.Conv2d(4, 8, 1),
            depthwise(),
            self.SqueezeExcite(),
            nn.Conv2d(8, 4, 1),
        )


def block(*middle):
    return nn.Sequential(nn.Conv2d(4, 8, 1), *middle, nn.Conv2d(8, 4, 1))


def hooked():
    found = block(depthwise())
    found[0].register_forward_hook(lambda *_: None)
    return found


def parametrised():
    found = block(depthwise())
    parametrizations.weight_norm(found[2])
    return found


REFUSED = {
    "stride": (lambda: block(depthwise(stride=2)), r"stride=\(1, 1\) in 1, not \(2, 2\)"),
    "dilation": (lambda: block(depthwise(dilation=2, padding=2)), r"padding=\(1, 1\) in 1, not \(2, 2\)"),
    "even side": (lambda: block(nn.Conv2d(8, 8, 9, padding=4, groups=8)), "side .*, not 9"),
    "squeeze-and-excitation": (Squeezed, "squeeze-and-excitation.*, as se is"),
    "gate": (Gated, "contract takes 8 of 16 channels: a gate"),
    "activation ahead of the norm": (lambda: block(nn.GELU(), nn.BatchNorm2d(8), depthwise()), "2 is behind one"),
    "another norm": (lambda: block(nn.GroupNorm(1, 8), depthwise()), "no GroupNorm, as 1 is"),
    "hook": (hooked, "0 has a hook"),
    "parametrised": (parametrised, "2 is parametrised"),
    "unknown class": (lambda: block(depthwise(), nn.GELU()), "no adapter is known for .*Sequential; register_fusion"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_block_that_no_operator_computes_has_a_row_that_says_why(make, reason):
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "block": make()})
    (row,) = explain(fuse(model))
    assert (row.name, row.operator, row.fused, row.backend) == ("block", "leff", False, "plain")
    assert re.search(reason, row.reason), row.reason


def test_fused_modules_have_the_backend_and_why_not_the_others():
    (row,) = explain(make_pair("leff")[1])
    assert (row.plain_class, row.operator, row.fused, row.backend) == (
        "LocallyEnhancedFeedForward",
        "leff",
        True,
        "native",
    )
    assert row.reason.startswith("the fastest that can run; triton: the tensor is on the CPU")
    of_linear_layers = MlpWithDepthwiseConv(8, 16)
    assert [row.operator for row in explain(fuse(of_linear_layers))] == ["leff"]  # it reads what they have
    of_linear_layers.act = nn.Tanh()
    assert [row.operator for row in explain(of_linear_layers)] == ["leff", "linear", "linear"]
    with use_backend("leff=reference"):
        assert [row.backend for row in explain(make_pair("leff")[1])] == ["reference"]


def dropping(lca):
    lca.attn_drop.p = 0.5
    lca.attn_drop.eval()


DONE = {
    "hook": ("leff", lambda leff: leff.conv2.register_forward_hook(print), "conv2 has a hook"),
    "hook of gradients": ("leff", lambda leff: leff.bn1.register_full_backward_pre_hook(print), "bn1 has a hook"),
    "forward": ("leff", lambda leff: setattr(leff.act, "forward", abs), "act has a forward of its own"),
    "buffer": ("leff", lambda leff: leff.register_buffer("own", torch.ones(1)), "the kernels know nothing of own"),
    "no child": ("leff", lambda leff: delattr(leff, "bn2"), "the module has no bn2"),
    "no parameter": ("linear", lambda linear: delattr(linear, "bias"), "the module has no bias"),
    "no matrix": (
        "linear",
        lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(32))),
        "weight is no matrix",
    ),
    "mode": ("lca", dropping, "attn_drop is in another mode than the module"),
    "scale": (
        "i2t",
        lambda i2t: setattr(i2t.conv, "stride", (4, 4)),
        "the kernels have stride=(2, 2) in conv, not (4, 4)",
    ),
}


@pytest.mark.parametrize(("name", "change", "reason"), DONE.values(), ids=DONE)
def test_what_was_done_to_a_fused_module_is_its_reason(name, change, reason):
    module = make_pair(name)[1]
    assert explain(module)[0].backend == "native"
    change(module)
    row = explain(module)[0]
    assert (row.backend, row.reason) == ("plain", reason)


def test_a_global_hook_is_the_reason_of_all():
    handle = nn.modules.module.register_module_forward_hook(print)
    try:
        assert [row.reason for row in explain(make_pair("leff")[1])] == ["a global hook of modules is set"]
    finally:
        handle.remove()


def test_known_classes_that_stayed_plain_say_why():
    class Adapted(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), Adapted(4, 4), nn.Linear(4, 4)
    )
    model[3].forward = lambda x: x
    rows = {row.name: row.reason for row in explain(fuse(model)) if not row.fused}
    assert rows == {
        "1": "parametrised: its tensors are computed at every use",
        "2": "a subclass of Linear, which may compute something else",
        "3": "it has a forward of its own",
    }
    assert "has not been called" in explain(unfuse(model))[0].reason


def test_a_frozen_model_is_explained_too():
    frozen = freeze(LocallyEnhancedFeedForward(8, 16))
    (row,) = explain(frozen)
    assert row.name == "model"
    assert row.reason.startswith("frozen; ")


def test_the_text_has_a_line_for_modules_that_are_alike():
    lines = str(explain(fuse(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), torch.nn.ReLU())))).splitlines()
    assert lines[0].split() == ["module", "class", "operator", "runs", "by", "why"]
    assert len(lines) == 2
    assert lines[1].startswith("0 and 2 more")
