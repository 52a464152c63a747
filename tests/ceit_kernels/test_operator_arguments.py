"""Registered operators name a tensor that is not on the device of the others, holds integers or has another shape."""

import re

import pytest
import torch
from support.fused_modules import MODULES, make_pair
from torch.utils._python_dispatch import TorchDispatchMode

from ceit_kernels import use_backend
from ceit_kernels.add_norm.op import add_norm_operator
from ceit_kernels.i2t.op import size_unsupported_reason
from ceit_kernels.lca.op import lca_operator
from ceit_kernels.leff.arguments import kernel_size_unsupported_reason


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


def of_norm(rows, channels):
    return add_norm_operator.unsupported(torch.empty(rows, channels, device="meta"))


def of_layers(layers, head_dim):
    return lca_operator.unsupported(torch.empty(1, layers, 2 * head_dim, device="meta"), None, None, None, 2)


def of_stem(batch, in_channels, channels):
    return size_unsupported_reason(torch.empty(batch, in_channels, 8, 8, device="meta"), channels)


def of_block(side):
    return kernel_size_unsupported_reason(torch.empty(1, 1, side, side, device="meta"))


@pytest.mark.parametrize(
    ("ask", "within", "beyond", "reason"),
    [
        (of_norm, (1, 4096), (1, 4097), "up to 4096 channels, x has 4097"),
        (of_norm, (2**31 - 4096, 1), (2**31 - 4095, 1), "up to 2147479552 rows, x has 2147479553"),
        (of_layers, (128, 256), (129, 1), "up to 128 layers, x has 129"),
        (of_layers, (1, 256), (1, 257), "up to 256 channels, x has 257"),
        (of_stem, (1, 4, 32), (1, 5, 32), "up to 4 channels, x has 5"),
        (of_stem, (1, 1, 96), (1, 1, 97), r"\(32, 64, 96\) channels, not 97"),
        (of_stem, (1, 3, 64), (0, 3, 64), "the batch is empty"),
        (of_block, (3,), (1,), r"side \(3, 5, 7\), not 1"),
        (of_block, (7,), (9,), r"side \(3, 5, 7\), not 9"),
    ],
)
def test_kernels_say_the_sizes_that_they_take(ask, within, beyond, reason):
    assert ask(*within) is None
    assert re.search(reason, ask(*beyond))


def test_a_gradient_that_cannot_be_taken_is_named():
    x, rows = torch.randn(2, 3, 4), torch.ones(2, 3)
    for needs, name in (((True, True, False), "weight"), ((True, False, True), "bias")):
        with pytest.raises(ValueError, match=f"need_{name}: expected False where {name} is None, got True"):
            torch.ops.ceit.add_norm_backward(x, None, None, x, None, None, rows, rows, None, *needs, False, "native")
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(32, 3, 7, 7, requires_grad=True)
    out, *_ = torch.ops.ceit.i2t(image, weight, None, None, None, None, 1e-5, False, None, None, "native")
    with pytest.raises(RuntimeError, match="a gradient needs a forward with need_indices=True"):
        out.sum().backward()
