"""Registered operators refuse a tensor that is not on the device of the others, or holds integers, and name it."""

import pytest
import torch
from support.fused_modules import MODULES, make_pair
from torch.utils._python_dispatch import TorchDispatchMode

from ceit_kernels import use_backend


class Recorder(TorchDispatchMode):
    """Keeps one call of every operator, of forward passes alone."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "ceit" and not operator._opname.startswith("_"):
            self.calls.setdefault(operator._opname, (operator, args))
        return operator(*args, **(kwargs or {}))


def recorded_calls():
    with use_backend("native"), torch.no_grad(), Recorder() as recorder:
        for name in MODULES:
            for training in (True, False):
                _, fused, x = make_pair(name, training=training)
                fused(x)
    return recorder.calls


def test_a_tensor_of_another_device_or_of_integers_is_named():
    calls = recorded_calls()
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
