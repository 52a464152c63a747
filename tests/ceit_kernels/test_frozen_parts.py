"""What is done to the parts of a snapshot."""

import copy

import pytest
import torch
from support.snapshots import X, make_model, through_a_file
from torch import nn

from ceit_kernels import freeze


def with_another_weight(model):
    model[1].weight = 2 * model[1].weight.detach()


def with_another_norm(model):
    model[0].bn2 = nn.BatchNorm2d(64).eval()


def with_norms_in_training(model):
    model[0].train()


def in_another_dtype_and_back(model):
    model.bfloat16().float()


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [with_another_weight, with_another_norm, with_norms_in_training, in_another_dtype_and_back]
)
def test_what_is_done_to_a_prepacked_part_is_not_ignored(change):
    model = make_model()
    frozen, changed = freeze(model), copy.deepcopy(model)
    before = frozen(X)
    if change is with_another_weight:
        changed[1].weight = nn.Parameter(2 * changed[1].weight)
    else:
        change(changed)
    change(frozen.model)
    expected = changed(X)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(frozen(X), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_not_loaded_into_a_part_of_a_snapshot():
    frozen = freeze(make_model())
    for part in (frozen.model, frozen.model[0].conv1, copy.deepcopy(frozen).model, through_a_file(frozen).model[1]):
        with pytest.raises(RuntimeError, match="a frozen model cannot be loaded into"):
            part.load_state_dict(part.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("change", ["a new norm", "parts in training"])
def test_evaluation_mode_reaches_the_parts(change):
    """As of any module: what is new in a snapshot is in training mode until then."""
    model = make_model()
    frozen, changed = freeze(model), copy.deepcopy(model)
    for each in (frozen.model, changed):
        if change == "a new norm":
            each[0].bn2 = nn.BatchNorm2d(64)
        else:
            each.train()
    frozen.eval()
    changed.eval()
    assert not any(module.training for module in frozen.modules())
    torch.testing.assert_close(frozen(X), changed(X), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in frozen.requires_grad_(False).parameters())
