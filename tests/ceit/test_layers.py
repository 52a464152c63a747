import pytest
import torch
from torch import nn

from ceit.layers import Attention, Image2Tokens, LCAAttention, LocallyEnhancedFeedForward


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_leff_passes_the_class_token_unchanged():
    x = torch.randn(2, 17, 8)
    out = LocallyEnhancedFeedForward(8, 16)(x)
    assert torch.equal(out[:, 0], x[:, 0])
    assert not torch.isclose(out[:, 1:], x[:, 1:]).any(dim=2).all()


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_leff_mixes_a_token_with_its_neighbourhood_on_the_grid_only(kernel_size):
    leff = LocallyEnhancedFeedForward(4, kernel_size=kernel_size).eval()
    height, width, row, column = 9, 11, 4, 5
    x = torch.randn(1, 1 + height * width, 4)
    changed = x.clone()
    changed[:, 1 + row * width + column] += 1
    moved = (leff(x, (height, width)) != leff(changed, (height, width))).any(dim=2)[0, 1:].reshape(height, width)
    reach = kernel_size // 2
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[row - reach : row + reach + 1, column - reach : column + reach + 1] = True
    assert torch.equal(moved, expected)


def test_leff_has_no_activation_behind_its_last_norm():
    leff = LocallyEnhancedFeedForward(4, with_bn=False)
    leff.conv3.weight.data.zero_()
    leff.conv3.bias.data.fill_(-3.0)
    assert (leff(torch.randn(1, 5, 4))[:, 1:] == -3.0).all()


def test_leff_without_prefix_tokens_may_change_the_dimension():
    leff = LocallyEnhancedFeedForward(4, 8, 6, num_prefix_tokens=0)
    assert leff(torch.randn(2, 12, 4), (3, 4)).shape == (2, 12, 6)


def test_leff_adds_a_residual_to_every_token():
    leff, x, residual = LocallyEnhancedFeedForward(8, 16).eval(), torch.randn(2, 17, 8), torch.randn(2, 17, 8)
    assert torch.equal(leff(x, residual=residual), leff(x) + residual)


def test_leff_without_norm_has_no_norm_parameters():
    assert not [name for name in LocallyEnhancedFeedForward(4, with_bn=False).state_dict() if "bn" in name]


@pytest.mark.parametrize(
    ("tokens", "grid_size", "message"),
    [
        (13, None, "1 prefix and a square number of patch tokens, got 13 tokens"),
        (1, None, "a square number of patch tokens, got 1 tokens"),
        (13, (3, 5), r"grid_size 3 \* 5 = 15 patch tokens, got 13 tokens"),
    ],
)
def test_leff_refuses_tokens_that_make_no_grid(tokens, grid_size, message):
    with pytest.raises(ValueError, match=message):
        LocallyEnhancedFeedForward(4)(torch.randn(1, tokens, 4), grid_size)


@pytest.mark.parametrize("kernel_size", [2, 0, -1])
def test_leff_refuses_an_even_or_empty_kernel(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size: expected an odd number, got {kernel_size}"):
        LocallyEnhancedFeedForward(4, kernel_size=kernel_size)


def test_leff_refuses_to_change_the_dimension_of_prefix_tokens():
    with pytest.raises(ValueError, match="out_features: expected in_features=4, which prefix tokens keep, got 6"):
        LocallyEnhancedFeedForward(4, out_features=6)


def test_the_stem_has_no_activation_and_quarters_the_image_rounded_up():
    stem = Image2Tokens(in_chans=1)
    stem.bn.bias.data.fill_(-100.0)
    out = stem(torch.randn(2, 1, 30, 41))
    assert out.shape == (2, 64, 8, 11)
    assert (out < 0).all()


def attention_by_hand(attention, x, queries):
    """The attention of the tokens `queries` to all, with the scores written out."""
    batch, _, dim = x.shape
    q, k, v = attention.qkv(x).reshape(batch, -1, 3, attention.num_heads, dim // attention.num_heads).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, queries], k) * attention.scale
    heads = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    return attention.proj(heads.flatten(2))


@pytest.mark.parametrize("qk_scale", [None, 0.7])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("kind", "queries"), [(Attention, slice(None)), (LCAAttention, slice(-1, None))])
def test_attention_is_softmax_of_scaled_scores(kind, queries, qkv_bias, qk_scale):
    attention = kind(12, num_heads=3, qkv_bias=qkv_bias, qk_scale=qk_scale).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert attention.scale == (qk_scale or 0.5)
    torch.testing.assert_close(attention(x), attention_by_hand(attention, x, queries), rtol=1e-12, atol=1e-12)


def test_attention_of_the_first_tokens_alone():
    attention, x = Attention(12, num_heads=3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x, num_queries=2), attention(x)[:, :2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Attention, LCAAttention])
def test_attention_dropout_drops_weights_in_training_and_keeps_the_mean(kind):
    attention = kind(8, num_heads=2, attn_drop=0.5)
    attention.proj = nn.Identity()
    x = torch.randn(1, 4, 8)
    many = attention(x.expand(20000, -1, -1)).detach()
    assert many.std(dim=0).max() > 0.1
    attention.eval()
    torch.testing.assert_close(many.mean(dim=0, keepdim=True), attention(x).detach(), rtol=0, atol=0.03)
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("num_heads", [3, 0])
def test_attention_refuses_heads_that_do_not_divide_the_dimension(num_heads):
    with pytest.raises(ValueError, match=f"num_heads: expected a divisor of dim=8, got {num_heads}"):
        Attention(8, num_heads=num_heads)
