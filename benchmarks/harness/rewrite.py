"""What one could write by hand with PyTorch: linear layers over tokens, folded norms, channels-last convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceit.layers import Image2Tokens, LocallyEnhancedFeedForward
from ceit_kernels.leff import token_grid


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with the norm behind it folded in."""
    if not isinstance(norm, nn.BatchNorm2d):
        return conv.weight, conv.bias
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    return conv.weight * scale[:, None, None, None], bias * scale + norm.bias


class _Rewritten(nn.Module):
    """A module with the parts of a plain one, and its weights folded once where it only infers."""

    def __init__(self, plain: nn.Module, parts: dict[str, str]) -> None:
        super().__init__()
        for conv, norm in parts.items():
            setattr(self, conv, getattr(plain, conv))
            setattr(self, norm, getattr(plain, norm))
            if not plain.training:
                with torch.no_grad():
                    weight, bias = _fold(getattr(plain, conv), getattr(plain, norm))
                self.register_buffer(f"folded_{conv}", weight.contiguous(memory_format=torch.channels_last), False)
                self.register_buffer(f"folded_{conv}_bias", bias, False)
        self.train(plain.training)


class RewrittenLeFF(_Rewritten):
    """LeFF with matmuls over tokens in place of 1x1 convolutions; the tokens are the channels-last image already.

    Shapes:
        (B, num_prefix_tokens + H * W, C) -> the same.
    """

    def __init__(self, plain: LocallyEnhancedFeedForward) -> None:
        super().__init__(plain, {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"})
        self.act, self.num_prefix_tokens = plain.act, plain.num_prefix_tokens

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """As `LocallyEnhancedFeedForward.forward`."""
        height, width = token_grid(x.shape[1], self.num_prefix_tokens, grid_size)
        prefix, z = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        z = self._linear(z, "conv1", self.bn1)
        z = self.act(z).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        z = self._depthwise(z).permute(0, 2, 3, 1).flatten(1, 2)
        z = torch.cat((prefix, self._linear(self.act(z), "conv3", self.bn3)), dim=1)
        return z if residual is None else residual + z

    def _linear(self, x: Tensor, name: str, norm: nn.Module) -> Tensor:
        if not self.training:
            weight, bias = getattr(self, f"folded_{name}"), getattr(self, f"folded_{name}_bias")
            return F.linear(x, weight.flatten(1), bias)
        conv = getattr(self, name)
        z = F.linear(x, conv.weight.flatten(1), conv.bias)
        return _batch_norm(z.flatten(0, 1), norm).view_as(z)

    def _depthwise(self, z: Tensor) -> Tensor:
        if not self.training:
            return F.conv2d(
                z, self.folded_conv2, self.folded_conv2_bias, padding=self.conv2.padding, groups=self.conv2.groups
            )
        return self.bn2(self.conv2(z))


def _batch_norm(z: Tensor, norm: nn.Module) -> Tensor:
    """A BatchNorm2d over (positions, channels)."""
    if not isinstance(norm, nn.BatchNorm2d):
        return z
    norm.num_batches_tracked.add_(1)
    return F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)


class RewrittenImage2Tokens(_Rewritten):
    """The stem in channels-last memory, its norm folded into the convolution where it only infers.

    Shapes:
        (B, in_chans, H, W) -> (B, out_chans, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, plain: Image2Tokens) -> None:
        super().__init__(plain, {"conv": "bn"})
        self.maxpool = plain.maxpool

    def forward(self, x: Tensor) -> Tensor:
        """As `Image2Tokens.forward`."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self.training:
            return self.maxpool(self.bn(self.conv(x)))
        z = F.conv2d(x, self.folded_conv, self.folded_conv_bias, self.conv.stride, self.conv.padding)
        return self.maxpool(z)


class GELUMlp(nn.Module):
    """Two linear layers with GELU between them: what the block costs without convolution and norms.

    Shapes:
        (..., C) -> (..., C).
    """

    def __init__(self, plain: LocallyEnhancedFeedForward) -> None:
        super().__init__()
        channels, hidden = plain.conv1.in_channels, plain.conv1.out_channels
        like = {"device": plain.conv1.weight.device, "dtype": plain.conv1.weight.dtype}
        self.fc1, self.fc2 = nn.Linear(channels, hidden, **like), nn.Linear(hidden, channels, **like)
        self.train(plain.training)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Apply the layers to every token; the grid does not matter."""
        z = self.fc2(F.gelu(self.fc1(x)))
        return z if residual is None else residual + z


REWRITTEN = {LocallyEnhancedFeedForward: RewrittenLeFF, Image2Tokens: RewrittenImage2Tokens}
MLP = {LocallyEnhancedFeedForward: GELUMlp}


def rewrite(module: nn.Module, by: dict[type, type]) -> nn.Module:
    """Replace plain modules in `module` by those of their class in `by`, in place; returns the result."""
    if type(module) in by:
        return by[type(module)](module)
    for name, child in module.named_children():
        setattr(module, name, rewrite(child, by))
    return module
