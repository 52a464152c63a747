"""Whether a call is eager, and whether operators may run at all: one thing at a time."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ceit import shortcuts
from ceit_kernels.common.calls import foreign_reason, is_eager, needs_gradient, unsupported_reason


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def plainly(ask, x):
    return ask(x)


def in_a_dispatch_mode(ask, x):
    with Passing():
        return ask(x)


def in_vmap(ask, x):
    found = []
    torch.func.vmap(lambda row: found.append(ask(row)) or row)(x)
    return found[0]


def in_forward_mode(ask, x):
    with forward_ad.dual_level():
        return ask(x)


def traced(ask, x):
    found = []
    torch.jit.trace(lambda y: found.append(ask(y)) or y + 1, x, check_trace=False)
    return found[0]


def of_a_subclass(ask, x):
    return ask(x.as_subclass(Own))


def on_meta(ask, x):
    return ask(x.to("meta"))


@pytest.mark.parametrize(
    ("where", "eager", "at_once", "reason"),
    [
        (plainly, True, True, None),
        (in_a_dispatch_mode, False, None, None),
        (in_vmap, False, False, "a transform of torch.func is active"),
        (in_forward_mode, True, False, "derivatives are taken in forward mode"),
        (traced, True, False, "torch.jit traces the call"),
        (of_a_subclass, False, False, "the kernels do not know Own"),
        (on_meta, True, False, None),
    ],
)
def test_what_sees_a_call_decides_how_it_runs(where, eager, at_once, reason):
    x = torch.randn(2, 3)
    assert where(is_eager, x) is eager
    assert at_once is None or where(shortcuts.is_eager, x) is at_once
    found = where(unsupported_reason, x)
    assert found is None if reason is None else reason in found


def test_tensors_of_other_kinds_are_named():
    good = torch.ones(2)
    assert foreign_reason(None, good, torch.nn.Parameter(good)) is None
    assert foreign_reason(good, None, good.to_sparse()) == "the kernels do not take tensors of layout torch.sparse_coo"
    assert foreign_reason(good, good.cfloat()) == "the kernels do not compute in torch.complex64"


def test_a_gradient_may_be_wanted_of_any_of_some_tensors():
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not needs_gradient(None, plain)
    assert needs_gradient(None, plain, leaf)
    with torch.no_grad():
        assert not needs_gradient(leaf)
