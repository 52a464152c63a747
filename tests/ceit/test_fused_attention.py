"""The encoder's attention in the model, fused against plain."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate
from torch import nn

import ceit
from ceit.layers import Attention
from ceit_kernels import FusedAttention, FusedLinear, fuse, unfuse, use_backend

ONLY = {"leff": False, "lca": False, "i2t": False, "add_norm": False}


def make_model(**options):
    torch.manual_seed(0)
    return ceit.create_model(
        "ceit_tiny_patch16_224", fused=False, img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5, **options
    )


def train_step(model, images, grad_out, backend):
    with use_backend(f"attention={backend}"):
        out = model(images)
    out.backward(grad_out)
    return {"out": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_has_the_plain_ones_results_and_gradients(linear, training):
    model, images, grad_out = make_model().train(training), torch.randn(3, 3, 64, 64), torch.randn(3, 5)
    fused = fuse(copy.deepcopy(model), **ONLY, linear=linear)
    assert sum(type(module) is FusedAttention for module in fused.modules()) == 2
    exact = train_step(copy.deepcopy(model).double(), images.double(), grad_out.double(), "reference")
    plain, found = train_step(model, images, grad_out, "reference"), train_step(fused, images, grad_out, "native")
    assert list(found) == list(plain)
    assert_as_accurate(list(exact), *([results[name] for name in exact] for results in (found, plain, exact)))


def test_the_last_block_asks_for_its_class_token_alone(monkeypatch):
    queries = []
    forward = FusedAttention.forward

    def spy(self, x, num_queries=None):
        queries.append(num_queries)
        return forward(self, x, num_queries)

    monkeypatch.setattr(FusedAttention, "forward", spy)
    model, images = fuse(make_model().eval(), **ONLY), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model(images)
        assert queries == [None, 1]
        torch.testing.assert_close(out, unfuse(model)(images))


def test_state_and_names_stay_through_fusing_and_back():
    model = make_model()
    state, plain = list(model.state_dict()), [m for m in model.modules() if type(m) is Attention]
    fuse(model, **ONLY)
    assert list(model.state_dict()) == state
    fused = [module for module in model.modules() if type(module) is FusedAttention]
    assert [type(module.qkv) for module in fused] == [FusedLinear] * 2
    unfuse(model)
    assert [module for module in model.modules() if type(module) is Attention] == plain


def test_a_projection_of_another_kind_is_called_as_it_is():
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    plain, x = Attention(16, 2), torch.randn(2, 5, 16)
    plain.qkv = Adapted(16, 48)
    torch.testing.assert_close(FusedAttention.from_plain(plain)(x), plain(x))


def test_what_drops_weights_in_another_way_is_refused():
    plain = Attention(16, 2)
    plain.attn_drop = nn.Identity()
    with pytest.raises(TypeError, match=r"this Attention: the kernels take Dropout for attn_drop, not Identity"):
        FusedAttention.from_plain(plain)


def test_the_first_tokens_alone_have_a_gradient_where_the_others_count_for_statistics():
    torch.manual_seed(0)
    attention, x = FusedAttention(24, 3).double(), torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    every, first = attention.forward_first(x, 2)
    expected = attention(x)
    assert not every.requires_grad
    torch.testing.assert_close(every, expected.detach(), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(first.square().sum(), [x, *attention.parameters()])
    wanted = torch.autograd.grad(expected[:, :2].square().sum(), [x, *attention.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"attn_drop, proj_drop: expected none, got 0\.1 and 0\.0"):
        FusedAttention(24, 3, attn_drop=0.1).forward_first(x.float(), 1)
