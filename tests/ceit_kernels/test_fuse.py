"""Fused modules are what the plain ones were: the same objects, of a subclass."""

import copy
import importlib
import io
import pickle
from pkgutil import resolve_name

import pytest
import torch
from support.fused_modules import make_pair
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn
from torch.nn.utils import parametrize

from ceit_kernels import (
    FusedAddNorm,
    FusedAttention,
    FusedImage2Tokens,
    FusedLCAAttention,
    FusedLeFF,
    FusedLinear,
    FusedPatchProjection,
    adapters,
    fuse,
    register_fusion,
    unfuse,
)
from ceit_kernels.add_norm import AddNorm
from ceit_kernels.attention import Attention
from ceit_kernels.common.module import Fusion
from ceit_kernels.i2t import Image2Tokens
from ceit_kernels.lca import LCAAttention
from ceit_kernels.leff import LocallyEnhancedFeedForward
from ceit_kernels.linear import PatchProjection
from ceit_kernels.operators import OPERATORS

PAIRS = {
    "leff": (LocallyEnhancedFeedForward, FusedLeFF, lambda: LocallyEnhancedFeedForward(8, 16)),
    "lca": (LCAAttention, FusedLCAAttention, lambda: LCAAttention(8, 2)),
    "i2t": (Image2Tokens, FusedImage2Tokens, Image2Tokens),
    "add_norm": (AddNorm, FusedAddNorm, AddNorm),
    "linear": (nn.Linear, FusedLinear, lambda: nn.Linear(8, 8)),
    "patches": (PatchProjection, FusedPatchProjection, lambda: PatchProjection(3, 8, 4, stride=4)),
    "attention": (Attention, FusedAttention, lambda: Attention(8, 2)),
}
pairs = pytest.mark.parametrize(("plain_class", "fused_class", "make"), PAIRS.values(), ids=PAIRS)


class TheirLeFF(LocallyEnhancedFeedForward):
    """A plain class of somebody else's."""


class TheirAttention(Attention):
    """Attention with an argument of its own in the place of ours."""

    def forward(self, x, mask=None):
        out = super().forward(x)
        return out if mask is None else out * mask


@pytest.fixture
def registered(monkeypatch):
    # The function ceit_kernels.fuse hides the module of that name.
    fusions = importlib.import_module("ceit_kernels.fuse")._fusions
    monkeypatch.setattr(importlib.import_module("ceit_kernels.fuse"), "_fusions", dict(fusions))
    register_fusion("leff", TheirLeFF, FusedLeFF)
    register_fusion("attention", TheirAttention, FusedAttention)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)), LCAAttention(16, 2))


@pairs
def test_a_fused_module_is_the_plain_object_and_an_instance_of_its_class(plain_class, fused_class, make):
    module = make()
    before = dict(module.__dict__)
    assert fuse(module) is module
    assert type(module) is fused_class
    assert isinstance(module, plain_class)
    assert repr(module).startswith(fused_class.__name__)
    assert module.__dict__ == before
    assert unfuse(module) is module
    assert type(module) is plain_class
    assert module.__dict__ == before


def test_a_model_keeps_its_modules_references_and_parameters(model):
    attention, parameters, names = model[1], list(model.parameters()), list(model.state_dict())
    model.shortcut = attention.qkv
    assert fuse(model) is model
    assert model[1] is attention
    assert model.shortcut is model[1].qkv
    assert type(model.shortcut) is FusedLinear
    assert list(model.state_dict())[: len(names)] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_either_loads_the_others_weights(model):
    fused = fuse(copy.deepcopy(model))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    fused.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(fused(x), other(x))


def test_a_flag_leaves_its_operator_alone(model):
    fuse(model, lca=False)
    assert type(model[1]) is LCAAttention
    assert type(model[1].qkv) is FusedLinear


def test_hooks_of_a_module_go_on_through_fuse_and_unfuse(model):
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    x = torch.randn(2, 3, 16)
    for change in (fuse, unfuse):
        change(model)(x).sum().backward()
    assert calls == ["forward", "backward"] * 2


def test_unfuse_keeps_what_was_changed_since(model):
    attention = fuse(model)[1]
    attention.scale, attention.proj, attention.note = 1.0, nn.Linear(16, 16), "mine"
    added = []
    attention.register_full_backward_hook(lambda *_: added.append(1))
    x = torch.randn(2, 3, 16)
    out = model(x)
    unfuse(model)
    torch.testing.assert_close(model(x), out)
    model(x).sum().backward()
    assert attention.note == "mine"
    assert added == [1]


def test_unfuse_keeps_a_parametrisation():
    layer = fuse(nn.Linear(8, 8))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    expected = layer(torch.ones(1, 8))
    unfuse(layer)
    assert not isinstance(layer, FusedLinear)
    assert parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(layer(torch.ones(1, 8)), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


def test_what_may_compute_something_else_stays_plain():
    class Changed(LocallyEnhancedFeedForward):
        """A subclass."""

    own_forward, parametrised = nn.Linear(8, 8), nn.Linear(8, 8)
    own_forward.forward = lambda x: x
    parametrize.register_parametrization(parametrised, "weight", nn.Tanh())
    model = nn.ModuleList([Changed(8), own_forward, parametrised, nn.Linear(8, 8)])
    classes = [type(module) for module in model]
    fuse(model)
    assert [type(module) for module in model[:3]] == classes[:3]
    assert type(model[3]) is FusedLinear


def test_one_odd_module_does_not_keep_the_others_plain():
    class Adapted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    odd = LocallyEnhancedFeedForward(8)
    odd.conv1 = Adapted(8, 8, 1)
    model = nn.Sequential(odd, LocallyEnhancedFeedForward(8)).eval()
    x = torch.randn(2, 5, 8)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)
    assert type(model[1]) is FusedLeFF


def test_a_module_used_twice_stays_one_module():
    shared = LCAAttention(16, 2)
    model = fuse(nn.ModuleList([shared, nn.Sequential(shared)]))
    assert model[0] is model[1][0]
    assert type(model[0]) is FusedLCAAttention


def test_fusing_twice_changes_nothing_more(model):
    fused = fuse(model)[1]
    assert fuse(model)[1] is fused
    assert type(fused) is FusedLCAAttention


def test_a_deep_copy_of_a_fused_model_is_fused_and_independent(model):
    duplicate = copy.deepcopy(fuse(model))
    nn.init.zeros_(duplicate[1].qkv.weight)
    assert model[1].qkv.weight.any()
    assert type(unfuse(duplicate)[1]) is LCAAttention
    assert type(model[1]) is FusedLCAAttention


@pairs
def test_a_fused_module_can_be_saved_whole(plain_class, fused_class, make):
    buffer = io.BytesIO()
    torch.save(fuse(make()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is fused_class
    assert type(unfuse(loaded)) is plain_class


def test_a_class_of_ones_own_is_fused_as_a_subclass_of_it(registered):
    leff = TheirLeFF(8).eval()
    x = torch.randn(2, 5, 8)
    expected = leff(x)
    assert fuse(leff) is leff
    assert isinstance(leff, TheirLeFF)
    assert type(leff).__name__ == "FusedTheirLeFF"
    torch.testing.assert_close(leff(x), expected)
    for duplicate in (copy.deepcopy(leff), pickle.loads(pickle.dumps(leff))):
        assert type(duplicate) is type(leff)
        torch.testing.assert_close(duplicate(x), expected)
    assert type(unfuse(leff)) is TheirLeFF


def test_arguments_that_only_ones_own_class_knows_reach_it(registered):
    attention = TheirAttention(8, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5, 8)
    expected, masked = attention(x), attention(x, mask)
    fuse(attention)
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(attention(x, mask), masked)
    torch.testing.assert_close(attention(x, mask=mask), masked)


def test_from_plain_shares_the_state_and_leaves_the_plain_module_as_it_is():
    plain = LocallyEnhancedFeedForward(8)
    fused = FusedLeFF.from_plain(plain)
    assert (type(plain), type(fused)) == (LocallyEnhancedFeedForward, FusedLeFF)
    assert fused.conv1 is plain.conv1


@pairs
def test_from_plain_refuses_what_is_no_plain_counterpart(plain_class, fused_class, make):
    with pytest.raises(TypeError, match=f"{fused_class.__name__} cannot stand in for this Bilinear: "):
        fused_class.from_plain(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(("name", "of"), [("linear", ""), ("patches", ""), ("i2t", "conv.")])
def test_weights_on_another_device_are_named(name, of):
    _, fused, x = make_pair(name)
    with pytest.raises(ValueError, match=rf"x: expected on meta like {of}weight, got cpu"):
        fused.to("meta")(x)


def test_operators_that_are_none_are_named():
    with pytest.raises(TypeError, match=r"fuse: expected operators of \('leff', .*\), got \['ffn', 'mlp'\]"):
        fuse(nn.Linear(2, 2), mlp=True, leff=False, ffn=False)


def test_register_fusion_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"operator: expected one of .*'lca'.*got 'mlp'"):
        register_fusion("mlp", nn.Linear, FusedLinear)
    for wrong in (nn.Linear, type("MyLinear", (FusedLinear,), {}), object, 3):
        with pytest.raises(TypeError, match=f"fused_class: expected a fused class such as FusedLeFF, got {wrong!r}"):
            register_fusion("linear", nn.Linear, wrong)


def test_a_forward_wrapped_after_fusing_goes_on_after_unfusing():
    module, calls = fuse(nn.Linear(512, 512)), []
    x, fused_forward = torch.randn(64, 512), module.forward

    def wrapped(*args):
        calls.append(1)
        return fused_forward(*args)

    module.forward = wrapped  # as offloading wrappers do
    expected = nn.functional.linear(x, module.weight, module.bias)
    torch.testing.assert_close(unfuse(module)(x), expected)
    del module.forward
    assert type(unfuse(module)) is nn.Linear
    assert calls == [1]


def test_a_linear_layer_takes_its_input_by_the_name_that_pytorch_has():
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    expected = layer(input=x)
    torch.testing.assert_close(fuse(layer)(input=x), expected)


def test_what_is_fused_does_not_depend_on_what_is_imported():
    fusions = importlib.import_module("ceit_kernels.fuse")._fusions
    assert {plain.__module__.partition(".")[0] for plain in fusions} == {"ceit_kernels", "torch"}
    assert not {"timm", "transformers"} & {name.partition(".")[0] for name in vars(adapters)}


def test_every_adapter_names_a_fusion_of_its_operator():
    for adapter in adapters.ADAPTERS.values():
        fusion = resolve_name(f"{adapters.__name__}.{adapter.fusion}")
        assert issubclass(fusion, Fusion)
        assert not issubclass(fusion, nn.Module)
        assert adapter.operator in OPERATORS


def test_a_class_that_was_given_another_forward_stays_plain(monkeypatch):
    monkeypatch.setattr(MlpWithDepthwiseConv, "forward", lambda self, x, feat_size: x)
    block = fuse(MlpWithDepthwiseConv(8), linear=False)
    assert type(block) is MlpWithDepthwiseConv


def test_a_model_without_anything_to_fuse_is_logged(caplog):
    fuse(nn.Sequential(nn.ReLU()))
    assert "no module of Sequential was fused; ceit_kernels.explain(model) says why" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="ceit_kernels"):
        fuse(fuse(nn.Linear(2, 2)))
    assert [record.getMessage() for record in caplog.records] == ["fused modules of Linear: {'linear': 1}"]
