"""What is done to a fused module after it was compiled: the compiled one follows, as that of a plain module does."""

import pytest
import torch
import torch.nn.functional as F
from support.fused_modules import assert_same, every_module, make_pair
from torch import nn

from ceit_kernels.add_norm import AddNorm


def changed(function):
    """Another function, whose results are not a multiple of the first one's, which a norm would not show."""
    return lambda *arguments, **options: function(*arguments, **options).sin()


def compiled_pair(name):
    """A plain module, a fused one and what is compiled of it, which was called, and an input."""
    plain, fused, x = make_pair(name, training=False)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager")
    with torch.no_grad():
        assert_same([compiled(x)], [plain(x)])
    return plain, fused, compiled, x


def parts_of(module):
    """The children of one argument that compute something in evaluation mode, one of each class."""
    parts = [(name, child) for name, child in module.named_modules() if name and not child._modules]
    of_class = {type(child): (name, child) for name, child in parts if type(child) not in (nn.Dropout, AddNorm)}
    return dict(of_class.values())


@torch.no_grad()
@every_module
def test_a_forward_that_a_part_is_given(name):
    plain, fused, compiled, x = compiled_pair(name)
    before = plain(x)
    for path in list(parts_of(plain))[-1:]:
        for module in (plain, fused):
            own = module.get_submodule(path)
            own.forward = changed(own.forward)
        assert not torch.allclose(plain(x), before)
        assert_same([compiled(x)], [plain(x)])


@torch.no_grad()
@every_module
def test_a_forward_that_classes_are_given(name, monkeypatch):
    plain, _, compiled, x = compiled_pair(name)
    before = plain(x)
    for kind in {type(plain), *map(type, parts_of(plain).values())}:
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", changed(kind.forward))
            assert not torch.allclose(plain(x), before)
            assert_same([compiled(x)], [plain(x)])
        assert_same([compiled(x)], [before])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "function"),
    [("leff", "conv2d"), ("leff", "gelu"), ("linear", "linear"), ("attention", "scaled_dot_product_attention")],
)
def test_a_function_in_the_place_of_pytorchs(name, function, monkeypatch):
    plain, _, compiled, x = compiled_pair(name)
    before = plain(x)
    with monkeypatch.context() as patch:
        patch.setattr(F, function, changed(getattr(F, function)))
        assert not torch.allclose(plain(x), before)
        assert_same([compiled(x)], [plain(x)])
    assert_same([compiled(x)], [before])
