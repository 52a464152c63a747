import pytest
import torch
from torch import nn

from ceit_kernels import FusedImage2Tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("in_chans", "kernel_size", "stride", "size"), [(3, 7, 2, (32, 24)), (1, 5, 1, (7, 9))])
def test_is_convolution_norm_and_pool(training, in_chans, kernel_size, stride, size):
    torch.manual_seed(0)
    stem = FusedImage2Tokens(in_chans, 8, kernel_size, stride).double().train(training)
    norm = nn.BatchNorm2d(8).double().train(training)
    x = torch.randn(2, in_chans, *size, dtype=torch.float64)
    torch.testing.assert_close(stem(x), stem.maxpool(norm(stem.conv(x))))
    torch.testing.assert_close(stem.bn.state_dict(), norm.state_dict())


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        FusedImage2Tokens()(torch.randn(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.uint8"):
        FusedImage2Tokens()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 like conv\.weight, got torch\.float64"):
        FusedImage2Tokens()(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x: expected on cpu like conv\.weight, got meta"):
        FusedImage2Tokens()(torch.zeros(2, 3, 8, 8, device="meta"))
