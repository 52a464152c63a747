"""What a call prepared for some modules relies on."""

import copy
import io

import pytest
import torch
from torch import nn

from ceit_kernels.block.watch import Watch, kept_by


def make_modules() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Sequential(nn.BatchNorm2d(4), nn.GELU())).eval()


def test_holds_while_nothing_changes():
    modules = make_modules()
    watch = Watch([modules])
    assert watch.is_idle
    assert watch.can_tell
    assert watch()
    assert watch()


def write(modules):
    with torch.no_grad():
        modules[1].weight.mul_(2)


def set_attribute(path, name, value):
    return lambda modules: setattr(modules.get_submodule(path), name, value)


@pytest.mark.parametrize(
    "change",
    [
        write,
        lambda modules: modules[2][0].running_mean.add_(1),
        set_attribute("1", "weight", nn.Parameter(torch.ones(4, 4))),
        set_attribute("1", "bias", None),
        set_attribute("2.0", "training", True),
        set_attribute("0", "eps", 0.5),
        set_attribute("2.1", "approximate", "tanh"),
        set_attribute("1", "forward", lambda x: x),
        lambda modules: setattr(modules[1].weight, "data", torch.ones(4, 4)),
        lambda modules: modules[2].__setitem__(1, nn.ReLU()),
        lambda modules: modules[1].register_forward_hook(lambda *_: None),
        lambda modules: modules[1].register_forward_pre_hook(lambda *_: None),
        lambda modules: modules[1].register_full_backward_hook(lambda *_: None),
    ],
)
def test_sees_every_change(change):
    modules = make_modules()
    watch = Watch([modules])
    change(modules)
    assert not watch()


def test_modules_at_work_are_not_idle_and_tensors_without_versions_cannot_be_told():
    modules = make_modules()
    modules[2][0].train()
    assert not Watch([modules]).is_idle
    with torch.inference_mode():
        inside = make_modules()
    assert not Watch([inside]).can_tell


def test_copies_and_pickles_of_a_module_go_without_what_was_prepared():
    modules = make_modules()
    kept_by(modules)["something"] = torch.ones(3)
    assert kept_by(modules)
    assert not kept_by(copy.deepcopy(modules))
    file = io.BytesIO()
    torch.save(modules, file)
    file.seek(0)
    assert not kept_by(torch.load(file, weights_only=False))
