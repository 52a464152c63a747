"""Kinds of calls that were seen before: what makes a call another one."""

import gc
import weakref

import pytest
import torch
from torch import nn

from ceit_kernels import FusedLeFF, leff_block
from ceit_kernels.common import seen
from ceit_kernels.common.calls import is_ordinary
from ceit_kernels.common.seen import Seen

needs_guards = pytest.mark.skipif(seen._guards is None, reason="this PyTorch compares tensors in Python alone")


class Subclass(torch.Tensor):
    pass


@needs_guards
def test_a_call_of_the_same_kind_is_known_and_one_with_any_other_tensor_is_not():
    found, x = Seen(), torch.randn(4, 4)
    found.keep("key", (x, None), "known")
    assert found.find("key", (torch.randn(4, 4), None)) == "known"
    assert found.find("other", (x, None)) is None
    unlike = [
        x.double(),
        torch.randn(4, 5),
        x.t(),
        x.to("meta"),
        nn.Parameter(x.clone()),
        x.clone().requires_grad_(),
        x.as_subclass(Subclass),
        x.to_sparse(),
        torch._neg_view(x),
        None,
    ]
    with torch.inference_mode():
        unlike.append(torch.randn(4, 4))
    for y in unlike:
        assert found.find("key", (y, None)) is None
    assert found.find("key", (x, x)) is None
    assert found.find("key", (None, x)) is None
    with torch.autocast("cpu"):
        assert found.find("key", (x, None)) is None
    torch.func.grad(lambda z: (unlike.append(found.find("key", (z, None))), z.sum())[1])(x)
    torch.func.vmap(lambda z: (unlike.append(found.find("key", (z, None))), z)[1])(torch.randn(3, 4, 4))
    assert unlike[-2:] == [None, None]


@needs_guards
def test_it_keeps_the_first_few_kinds_of_a_key_and_no_tensor():
    found, sizes = Seen(), range(1, 8)
    for size in sizes:
        found.keep("key", (torch.randn(size),), size)
    known = [found.find("key", (torch.randn(size),)) for size in sizes]
    assert known == [*range(1, 1 + seen._ALIKE), *[None] * (7 - seen._ALIKE)]
    x = torch.randn(9)
    found.keep("x", (x,), 9)
    kept = weakref.ref(x.untyped_storage())
    del x
    gc.collect()
    assert kept() is None


def test_calls_with_a_tensor_twice_or_of_a_subclass_are_not_kept():
    found, x = Seen(), torch.randn(4)
    found.keep("twice", (x, x), 1)
    found.keep("subclass", (x.as_subclass(Subclass),), 1)
    assert not found._kinds


def fails(*tensors, **options):
    raise TypeError("other arguments are expected")


@pytest.mark.parametrize("guards", [None, fails])
def test_where_pytorch_cannot_compare_tensors_no_call_is_known(monkeypatch, guards):
    monkeypatch.setattr(seen, "_guards", guards)
    found = Seen()
    found.keep("key", (torch.randn(4),), 1)
    assert found.find("key", (torch.randn(4),)) is None


def test_a_call_under_forward_mode_is_not_ordinary():
    assert is_ordinary()
    with torch.autograd.forward_ad.dual_level():
        assert not is_ordinary()


def test_what_is_done_to_a_block_between_calls_is_checked_again():
    block, x = FusedLeFF(8, num_prefix_tokens=0).eval(), torch.randn(2, 16, 8)
    for _ in range(2):
        block(x)
    assert block(x, (2, 8)).shape == x.shape
    with pytest.raises(ValueError, match="grid_size 3"):
        block(x, (3, 5))
    with pytest.raises(TypeError, match="float64"):
        block(x.double())
    block.conv3.bias.data = block.conv3.bias.data[:4]
    with pytest.raises(ValueError, match=r"conv3\.bias"):
        block(x)
    block.conv3.bias = None
    expected = super(FusedLeFF, block).forward(x)
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_given_as_soon_as_they_are_wanted():
    weights, x = [torch.randn(8, 4), torch.randn(8, 1, 3, 3), torch.randn(4, 8)], torch.randn(2, 16, 4)
    for _ in range(2):
        assert not leff_block(x, weights).requires_grad
    weights[1].requires_grad_()
    assert leff_block(x, weights).requires_grad
    with torch.no_grad():
        assert not leff_block(x, weights).requires_grad
    assert leff_block(x, weights).requires_grad
