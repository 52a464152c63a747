"""Fused modules whose children are, or have become, something else than the operators compute."""

import copy

import pytest
import torch
from support.fused_modules import MODULES, assert_same, make_pair, native, step
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from ceit_kernels import BackendError, FusedAttention, FusedLeFF, fuse, unfuse, use_backend
from ceit_kernels.attention import Attention
from ceit_kernels.leff import LocallyEnhancedFeedForward

WATCHED = {
    "leff": ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "act"),
    "leff without norms": ("bn2",),
    "i2t": ("conv", "bn", "maxpool"),
    "lca": ("qkv", "proj", "proj_drop"),
    "attention": ("qkv", "proj", "proj_drop"),
    "add_norm": ("norm",),
}
every_child = pytest.mark.parametrize(
    ("name", "child"), [(name, child) for name, children in WATCHED.items() for child in children]
)


class Adapter(nn.Module):
    """Adds to what a layer computes, and looks like it, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.tensor(0.5))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) * (1 + self.factor)


HOOKS = {
    "forward": lambda module, calls: module.register_forward_hook(lambda *_: calls.append(1)),
    "forward pre": lambda module, calls: module.register_forward_pre_hook(lambda *_: calls.append(1)),
    "with kwargs": lambda module, calls: module.register_forward_hook(lambda *_: calls.append(1), with_kwargs=True),
    "backward": lambda module, calls: module.register_full_backward_hook(lambda *_: calls.append(1)),
    "backward pre": lambda module, calls: module.register_full_backward_pre_hook(lambda *_: calls.append(1)),
}


@every_child
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_children_are_called(name, child, kind):
    plain, fused, x = make_pair(name)
    rows = []
    for module in (plain, fused):
        calls = []
        HOOKS[kind](module.get_submodule(child), calls)
        step(module, x)
        rows.append(len(calls))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", MODULES)
def test_global_hooks_see_what_they_see_in_the_plain_module(name):
    plain, fused, x = make_pair(name)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        plain(x)
        expected = len(calls)
        fused(x)
    finally:
        handle.remove()
    assert len(calls) == 2 * expected


def test_a_backend_that_was_asked_for_says_what_keeps_it_from_running():
    _, leff, x = make_pair("leff")
    with native():
        leff(x)
        handle = leff.bn2.register_forward_hook(lambda *_: None)
        with pytest.raises(BackendError, match="leff: backend 'native' was asked for but cannot run: bn2 has a hook"):
            leff(x)
        handle.remove()
        leff(x)
        leff.conv2.forward = lambda z: z
        with pytest.raises(BackendError, match="conv2 has a forward of its own"):
            leff(x)


@every_child
@pytest.mark.parametrize("after", [False, True])
def test_an_adapter_in_the_place_of_a_child_is_called_and_trained(name, child, after):
    plain, _, x = make_pair(name)
    fused = copy.deepcopy(plain)
    fused = fuse(fused) if after else fused
    for module in (plain, fused):
        setattr(module, child, Adapter(getattr(module, child)))
    found = step(fused if after else fuse(fused), x)
    assert_same(found, step(plain, x))
    assert fused.get_parameter(f"{child}.factor").requires_grad


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


def dilated(leff):
    leff.conv2.dilation, leff.conv2.padding = (2, 2), (2, 2)


def circular(leff):
    torch.manual_seed(1)
    leff.conv2 = nn.Conv2d(64, 64, 3, padding=1, groups=64, padding_mode="circular")


def grouped(leff):
    torch.manual_seed(1)
    leff.conv2 = nn.Conv2d(64, 64, 3, padding=1, groups=32)


def wider(leff):
    torch.manual_seed(1)
    leff.conv1 = nn.Conv2d(32, 64, 3, padding=1)


def with_a_gate(leff):
    leff.bn3 = nn.Sequential(leff.bn3, nn.Sigmoid())


def with_another_activation(leff):
    leff.act = nn.Tanh()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "change", [dilated, circular, grouped, wider, with_a_gate, with_another_activation], ids=lambda f: f.__name__
)
def test_settings_and_children_changed_before_or_after_fusing_are_honoured(change, after):
    plain, _, x = make_pair("leff")
    fused = copy.deepcopy(plain)
    change(plain)
    if after:
        change(fuse(fused))
    else:
        change(fused)
        fuse(fused)
    assert_same(step(fused, x), step(plain, x))


@pytest.mark.parametrize("change", [{"stride": (4, 4)}, {"padding": (2, 2)}, {"dilation": (2, 2)}], ids=str)
def test_settings_of_the_stem_are_honoured(change):
    plain, fused, x = make_pair("i2t")
    for stem in (plain, fused):
        vars(stem.conv).update(change)
    assert_same(step(fused, x), step(plain, x))


def test_a_projection_whose_patches_overlap_is_a_convolution():
    plain, fused, x = make_pair("patches")
    for projection in (plain, fused):
        projection.stride = (2, 2)
    assert_same(step(fused, x), step(plain, x))


@pytest.mark.parametrize(
    "reparametrise", [lambda m: prune.l1_unstructured(m, "weight", 0.5), weight_norm, spectral_norm]
)
@pytest.mark.parametrize(
    ("name", "child"), [("leff", "conv1"), ("leff", "conv2"), ("i2t", "conv"), ("lca", "qkv"), ("linear", "")]
)
def test_reparametrised_children_train_as_in_the_plain_module(name, child, reparametrise):
    results = []
    plain, fused, x = make_pair(name)
    for module in (plain, fused):
        torch.manual_seed(1)
        reparametrise(module.get_submodule(child))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        results.append(module.eval()(x))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["leff", "i2t"])
def test_frozen_norms_stay_frozen_in_training(name):
    freeze = pytest.importorskip("timm.layers").freeze_batch_norm_2d
    plain, fused, x = make_pair(name)
    expected = step(freeze(plain), x)
    assert_same(step(freeze(fused), x), expected)
    assert_same(step(fuse(plain), x), expected)


def test_norms_of_queries_and_keys_are_not_lost():
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm.Attention(32, 2, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    x = torch.randn(2, 17, 32)
    expected = theirs(x)
    with pytest.raises(TypeError, match="the kernels take Identity for q_norm, not LayerNorm"):
        FusedAttention.from_plain(theirs)
    torch.testing.assert_close(fuse(theirs)(x), expected)
    plain = timm.Attention(32, 2).eval()
    with use_backend("attention=native"):
        torch.testing.assert_close(FusedAttention.from_plain(plain)(x), plain(x))


def test_what_a_module_has_beside_the_operator_is_not_lost():
    class Gated(Attention):
        def __init__(self):
            super().__init__(32, 2)
            self.gate = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return super().forward(x) * self.gate

    with pytest.raises(TypeError, match="the kernels know nothing of gate"):
        FusedAttention.from_plain(Gated())


@pytest.mark.parametrize(("name", "p"), [("attention", 0.5), ("attention", 1.0), ("lca", 1.0)])
def test_dropout_of_attention_is_that_of_the_plain_module(name, p):
    plain, _, x = make_pair(name)
    plain.attn_drop.p = p
    fused = fuse(copy.deepcopy(plain))
    results = []
    for module in (plain, fused):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results)


def test_a_replaced_child_counts_at_once_and_so_does_its_return():
    plain, fused, x = make_pair("leff", training=False)
    before = fused.conv1
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
        fused.conv1 = Adapter(before)
        assert not torch.allclose(fused(x), expected)
        fused.conv1 = before
        with native():
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"first_act": False},
        {"layout": "NHWC", "num_prefix_tokens": 0},
        {"layout": "NCHW", "num_prefix_tokens": 0, "out_features": 48},
        {"bias": False, "with_bn": False},
        {"norm_layer": lambda channels: nn.GroupNorm(1, channels)},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_plain_class_is_the_reference_for_every_setting(options):
    torch.manual_seed(0)
    fused = FusedLeFF(32, 64, **options)
    plain = unfuse(copy.deepcopy(fused))
    assert type(plain) is LocallyEnhancedFeedForward
    shapes = {"tokens": (2, 17, 32), "NHWC": (2, 4, 4, 32), "NCHW": (2, 32, 4, 4)}
    x = torch.randn(shapes[fused.layout])
    assert_same(step(fused, x), step(plain, x))
