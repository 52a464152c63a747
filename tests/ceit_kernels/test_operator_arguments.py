"""Registered operators name a tensor that is not on the device of the others, holds integers or has another shape."""

import pytest
import torch
from support.fused_modules import MODULES, make_pair
from torch.utils._python_dispatch import TorchDispatchMode

from ceit_kernels import use_backend


class Recorder(TorchDispatchMode):
    """Keeps one call of every operator."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "ceit" and not operator._opname.startswith("_"):
            self.calls.setdefault(operator._opname, (operator, args))
        return operator(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded():
    with use_backend("native"), Recorder() as recorder:
        for name in MODULES:
            for training in (True, False):
                _, fused, x = make_pair(name, training=training)
                with torch.set_grad_enabled(training):
                    out = fused(x)
                if training:
                    out.sum().backward()
    return {name: (operator, [detached(arg) for arg in args]) for name, (operator, args) in recorder.calls.items()}


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_a_tensor_of_another_device_or_of_integers_is_named(recorded):
    calls = {name: call for name, call in recorded.items() if not name.endswith("_backward")}
    assert {"lca", "leff_inference", "i2t", "add_norm", "linear", "attention"} <= calls.keys()
    for operator, args in calls.values():
        names = [argument.name for argument in operator._schema.arguments]
        tensors = {name: value for name, value in zip(names, args, strict=False) if isinstance(value, torch.Tensor)}
        for i, name in enumerate(names):
            for change in ({"device": "meta"} if len(tensors) > 1 else {}, {"dtype": torch.int32}):
                if name not in tensors or not change:
                    continue
                changed = [*args[:i], tensors[name].to(**change), *args[i + 1 :]]
                with pytest.raises((TypeError, ValueError)) as error:
                    operator(*changed)
                # Where two do not fit together it may be the other.
                assert str(error.value).partition(":")[0] in tensors, (operator, name, change)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gradient_of_another_shape_is_named(recorded, device):
    calls = {name: call for name, call in recorded.items() if name.endswith("_backward")}
    assert len(calls) >= 6
    for operator, args in calls.values():
        grad_out, *rest = (value.to(device) if isinstance(value, torch.Tensor) else value for value in args)
        for changed in (grad_out[:-1], grad_out[None]):
            with pytest.raises(ValueError, match="grad_out: expected shape"):
                operator(changed, *rest)
