import copy
import importlib
import io

import pytest
import torch
from torch import nn

from ceit_kernels import FusedImage2Tokens, FusedLCAAttention, FusedLeFF, fuse, register_fusion, unfuse


class PlainAttention(FusedLCAAttention):
    """A plain module, as a model package would have it: the same state under its own name."""


@pytest.fixture
def plain_attention(monkeypatch):
    # The function ceit_kernels.fuse hides the module of that name.
    monkeypatch.setattr(importlib.import_module("ceit_kernels.fuse"), "_fusions", {})
    register_fusion("lca", PlainAttention, FusedLCAAttention.from_plain)
    return PlainAttention


@pytest.fixture
def model(plain_attention):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ModuleDict({"inner": plain_attention(16, 2)})["inner"])


def test_fuse_and_unfuse_swap_modules_over_the_same_state(model):
    plain, state, parameters = model[1], model.state_dict(), list(model.parameters())
    assert fuse(model) is model
    assert type(model[1]) is FusedLCAAttention
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert unfuse(model) is model
    assert model[1] is plain


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
    assert type(model[1]) is PlainAttention


def test_a_model_that_is_itself_plain_is_returned_fused(plain_attention):
    plain = plain_attention(16, 2)
    fused = fuse(plain)
    assert type(fused) is FusedLCAAttention
    assert unfuse(fused) is plain


def test_a_module_used_twice_stays_one_module(plain_attention):
    shared = plain_attention(16, 2)
    model = fuse(nn.ModuleList([shared, nn.Sequential(shared)]))
    assert model[0] is model[1][0]
    assert type(model[0]) is FusedLCAAttention


def test_training_mode_casts_hooks_and_new_children_survive_both_ways(model):
    calls = []
    handle = model[1].register_forward_hook(lambda *args: calls.append(1))
    fuse(model).eval().double()
    model(torch.randn(1, 3, 16, dtype=torch.float64))
    replaced = nn.Linear(16, 16).double()
    model[1].proj = replaced
    unfuse(model)
    assert not model[1].training
    assert model[1].qkv.weight.dtype == torch.float64
    assert model[1].proj is replaced
    handle.remove()
    model(torch.randn(1, 3, 16, dtype=torch.float64))
    assert calls == [1]


def test_a_deep_copy_of_a_fused_model_is_fused_and_independent(model):
    duplicate = copy.deepcopy(fuse(model))
    nn.init.zeros_(duplicate[1].qkv.weight)
    assert model[1].qkv.weight.any()
    unfuse(duplicate)
    assert type(duplicate[1]) is PlainAttention
    assert not duplicate[1].qkv.weight.any()


def test_fusing_twice_changes_nothing_more(model):
    fused = fuse(model)[1]
    assert fuse(model)[1] is fused
    unfuse(model)
    assert type(model[1]) is PlainAttention


def test_subclasses_and_altered_children_are_not_silently_replaced(model, plain_attention):
    class Adapted(nn.Linear):
        """A layer that computes something else from the same weight."""

    class Changed(plain_attention):
        """Attention that computes something else."""

    subclass = Changed(16, 2)
    assert fuse(subclass) is subclass
    model.append(plain_attention(16, 2))
    model[2].qkv = Adapted(16, 48)
    with pytest.raises(TypeError, match=r"needs PlainAttention\.qkv to be Linear or FusedLinear, got Adapted"):
        fuse(model)
    assert type(model[1]) is PlainAttention


def test_a_module_without_the_attributes_is_refused():
    with pytest.raises(TypeError, match="FusedLCAAttention needs the attribute 'num_heads', Linear has none"):
        FusedLCAAttention.from_plain(nn.Linear(2, 2))


@pytest.mark.parametrize("fused_class", [FusedLeFF, FusedImage2Tokens])
def test_every_fused_class_refuses_what_is_no_plain_counterpart(fused_class):
    with pytest.raises(TypeError, match=f"{fused_class.__name__} needs"):
        fused_class.from_plain(nn.Linear(2, 2))


def test_register_fusion_names_an_unknown_operator():
    with pytest.raises(ValueError, match=r"operator: expected one of .*'lca'.*got 'mlp'"):
        register_fusion("mlp", nn.Linear, lambda plain: plain)


def test_a_fused_model_can_be_saved_whole(model):
    buffer = io.BytesIO()
    torch.save(fuse(model), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(unfuse(loaded)[1]) is PlainAttention
