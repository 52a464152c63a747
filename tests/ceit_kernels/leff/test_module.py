import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ceit_kernels import FusedLeFF
from ceit_kernels.leff import LocallyEnhancedFeedForward, token_grid


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_convolves_the_image_that_the_tokens_make(kernel_size, with_bn, training):
    torch.manual_seed(0)
    leff = FusedLeFF(4, 10, kernel_size=kernel_size, with_bn=with_bn).double().train(training)
    norms = [nn.BatchNorm2d(n).double().train(training) if with_bn else nn.Identity() for n in (10, 10, 4)]
    image = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    class_token = torch.randn(2, 1, 4, dtype=torch.float64)

    hidden = F.gelu(norms[0](leff.conv1(image)))
    hidden = F.gelu(norms[1](leff.conv2(hidden)))
    expected = norms[2](leff.conv3(hidden)).flatten(2).mT
    out = leff(torch.cat((class_token, image.flatten(2).mT), dim=1), (3, 5))

    torch.testing.assert_close(out, torch.cat((class_token, expected), dim=1))
    for ours, theirs in zip((leff.bn1, leff.bn2, leff.bn3), norms, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_prefix_tokens_pass_unchanged_and_a_square_is_assumed(prefix):
    leff = FusedLeFF(4, 8, num_prefix_tokens=prefix)
    x = torch.randn(2, prefix + 9, 4)
    assert torch.equal(leff(x)[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(leff.eval()(x), leff(x, (3, 3)))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_is_added_to_every_token(prefix, training):
    leff = FusedLeFF(4, 8, num_prefix_tokens=prefix).train(training)
    x, residual = torch.randn(2, prefix + 9, 4), torch.randn(2, prefix + 9, 4)
    torch.testing.assert_close(leff(x, residual=residual), leff(x) + residual)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("make", [LocallyEnhancedFeedForward, FusedLeFF])
def test_frozen_norms_of_one_image_behind_one_channel_have_right_gradients(make, prefix):
    """Of an image of one channel PyTorch cannot tell the memory format."""
    leff = make(4, 1, num_prefix_tokens=prefix).eval()
    out = leff(torch.randn(1, prefix + 12, 4), (3, 4))
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(leff.bn3.bias.grad, grad[0, prefix:].sum(0))


def test_another_activation_and_width():
    leff = FusedLeFF(4, 8, 6, act_layer=nn.SiLU, num_prefix_tokens=0)
    assert isinstance(leff.act, nn.SiLU)
    assert leff(torch.randn(2, 9, 4)).shape == (2, 9, 6)


@pytest.mark.parametrize(
    ("tokens", "grid_size", "message"),
    [
        (8, None, "expected 1 prefix and a square number of patch tokens, got 8 tokens in all"),
        (7, (2, 4), r"expected 1 prefix and grid_size 2 \* 4 = 8 patch tokens, got 7 tokens in all"),
        (1, None, "got 1 tokens in all"),
        (1, (0, 0), r"grid_size: expected two positive integers, got \(0, 0\)"),
    ],
)
def test_tokens_that_make_no_image_are_refused(tokens, grid_size, message):
    with pytest.raises(ValueError, match=message):
        FusedLeFF(4)(torch.randn(2, tokens, 4), grid_size)
    with pytest.raises(ValueError, match=message):
        token_grid(tokens, 1, grid_size)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("make", [LocallyEnhancedFeedForward, FusedLeFF])
def test_an_image_has_the_grid_that_it_has(make, layout):
    leff = make(4, num_prefix_tokens=0, layout=layout)
    x = torch.randn(2, 3, 5, 4) if layout == "NHWC" else torch.randn(2, 4, 3, 5)
    for grid_size in (None, (3, 5)):
        assert leff(x, grid_size).shape == x.shape
    for grid_size in ((5, 3), (3, 4), (2, 5)):
        with pytest.raises(ValueError, match=r"grid_size: expected None or \(3, 5\) like the image x, got"):
            leff(x, grid_size)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, N, 4\), got \(2, 10, 5\)"):
        FusedLeFF(4)(torch.randn(2, 10, 5))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        FusedLeFF(4)(torch.zeros(2, 10, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 like conv1\.weight, got torch\.float16"):
        FusedLeFF(4)(torch.zeros(2, 10, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x: expected on cpu like conv1\.weight, got meta"):
        FusedLeFF(4)(torch.zeros(2, 10, 4, device="meta"))
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 10, 4\), got \(1, 10, 4\)"):
        FusedLeFF(4)(torch.zeros(2, 10, 4), residual=torch.zeros(1, 10, 4))
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 4"):
        FusedLeFF(4, kernel_size=4)
    with pytest.raises(ValueError, match="out_features: expected in_features=4, which prefix tokens keep, got 6"):
        FusedLeFF(4, out_features=6)
