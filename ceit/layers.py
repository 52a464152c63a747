"""The building blocks of CeiT in plain PyTorch: image-to-tokens stem, LeFF, self-attention and LCA attention.

Source: Yuan et al., Incorporating Convolution Designs into Visual Transformers, ICCV 2021.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceit_kernels import (
    FusedAddNorm,
    FusedAttention,
    FusedImage2Tokens,
    FusedLCAAttention,
    FusedLeFF,
    FusedLinear,
    FusedPatchProjection,
    register_fusion,
)
from ceit_kernels.leff import token_grid


class Image2Tokens(nn.Module):
    """Convolutional stem of the image-to-tokens module (section 3.2): convolution, BatchNorm, max-pooling.

    There is no activation. With the defaults the map is a quarter of the image a side, rounded up.

    Args:
        in_chans: channels of the image.
        out_chans: channels of the map.
        kernel_size: side of the convolution's kernel, in pixels.
        stride: stride of the convolution, in pixels; the pooling adds a stride of 2.

    Shapes:
        (B, in_chans, H, W) -> (B, out_chans, ceil(H / (2 * stride)), ceil(W / (2 * stride))) for an odd kernel_size.
    """

    def __init__(self, in_chans: int = 3, out_chans: int = 64, kernel_size: int = 7, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images (B, in_chans, H, W) into the map that patches are cut from."""
        return self.maxpool(self.bn(self.conv(x)))


class PatchProjection(nn.Conv2d):
    """Linear projection of square patches that lie side by side: a convolution with a stride of the kernel's size."""


class LocallyEnhancedFeedForward(nn.Module):
    """Locally-enhanced feed-forward layer, LeFF (section 3.3): expand, depthwise convolution on the grid, contract.

    Patch tokens take the place of pixels; prefix tokens (the class token) pass unchanged. Each of the three
    convolutions is followed by a BatchNorm if `with_bn`, the first two also by the activation.

    Args:
        in_features: embedding dimension of the tokens.
        hidden_features: channels of the depthwise convolution; None means `in_features`.
        out_features: embedding dimension of the result; None means `in_features`, the only choice with prefix tokens.
        kernel_size: side of the depthwise kernel in tokens, odd.
        with_bn: whether the convolutions are followed by BatchNorm.
        act_layer: builds the activation.
        num_prefix_tokens: number of tokens ahead of the patch tokens.

    Shapes:
        (B, num_prefix_tokens + H * W, in_features) -> (B, num_prefix_tokens + H * W, out_features).

    Raises:
        ValueError: for an even or non-positive `kernel_size`, or prefix tokens whose dimension would have to change.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        kernel_size: int = 3,
        with_bn: bool = True,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        num_prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if num_prefix_tokens and out_features != in_features:
            raise ValueError(
                f"out_features: expected in_features={in_features}, which prefix tokens keep, got {out_features}"
            )
        norm = nn.BatchNorm2d if with_bn else nn.Identity
        self.num_prefix_tokens = num_prefix_tokens
        self.conv1 = nn.Conv2d(in_features, hidden_features, kernel_size=1)
        self.conv2 = nn.Conv2d(
            hidden_features, hidden_features, kernel_size, padding=kernel_size // 2, groups=hidden_features
        )
        self.conv3 = nn.Conv2d(hidden_features, out_features, kernel_size=1)
        self.act = act_layer()
        self.bn1 = norm(hidden_features)
        self.bn2 = norm(hidden_features)
        self.bn3 = norm(out_features)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Mix each patch token with its neighbours on the grid.

        Args:
            x: tokens (B, num_prefix_tokens + H * W, in_features).
            grid_size: (H, W) in tokens; None means a square grid.
            residual: tokens of the result's shape that are added to it, prefix tokens included; None for nothing.

        Returns:
            Tokens (B, num_prefix_tokens + H * W, out_features).

        Raises:
            ValueError: if the number of tokens does not match `grid_size`, or is no square when it is None.
        """
        height, width = token_grid(x.shape[1], self.num_prefix_tokens, grid_size)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        z = patches.reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)
        z = self.act(self.bn1(self.conv1(z)))
        z = self.act(self.bn2(self.conv2(z)))
        z = self.bn3(self.conv3(z)).flatten(2).transpose(1, 2)
        z = torch.cat((prefix, z), dim=1) if self.num_prefix_tokens else z
        return z if residual is None else residual + z


class Attention(nn.Module):
    """Multi-head self-attention of ViT (section 3.1).

    Args:
        dim: embedding dimension.
        num_heads: number of heads, a divisor of `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the scores; None means (dim / num_heads) ** -0.5.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability of the output.

    Shapes:
        (B, N, dim) -> (B, num_queries, dim), N queries by default.

    Raises:
        ValueError: if `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Let the first `num_queries` tokens of (B, N, dim) attend to all, every token if None."""
        q, k, v = self._heads(self.qkv(x), 3)
        return self._attend(q if num_queries is None else q[:, :, :num_queries], k, v)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split (B, N, parts * dim) into `parts` tensors (B, heads, N, head_dim)."""
        # Parted where they lie, so that the gradients are put together there in one pass.
        return tuple(part.transpose(1, 2) for part in x.unflatten(2, (parts, self.num_heads, -1)).unbind(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class LCAAttention(Attention):
    """Attention of the layer-wise class-token attention, LCA (section 3.4): the last token asks all tokens.

    Parameters and arguments are those of `Attention`.

    Shapes:
        (B, L, dim) -> (B, 1, dim), L class tokens in the order of their layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Let the last token of (B, L, dim) attend to all."""
        sizes = (x.shape[2], 2 * x.shape[2])
        q_weight, kv_weight = self.qkv.weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        (q,) = self._heads(F.linear(x[:, -1:], q_weight, q_bias), 1)
        k, v = self._heads(F.linear(x, kv_weight, kv_bias), 2)
        return self._attend(q, k, v)


class AddNorm(nn.Module):
    """A residual connection and the norm behind it. It has no state: the norm is an argument of the call.

    Shapes:
        (..., dim), (..., dim) -> (..., dim), (..., dim).
    """

    def forward(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module, num_prefix_tokens: int | None = None
    ) -> tuple[Tensor, ...]:
        """Add a branch to the residual stream and normalise the sum.

        Args:
            x: the residual stream.
            branch: what is added to it; None for nothing.
            norm: the norm over `dim` channels.
            num_prefix_tokens: how many of the first tokens of the sum to return as well.

        Returns:
            The sum, which takes the place of `x`, and its norm; with `num_prefix_tokens` also the first tokens.
        """
        x = x if branch is None else x + branch
        return (x, norm(x)) if num_prefix_tokens is None else (x, norm(x), x[:, :num_prefix_tokens])


def is_watched(module: nn.Module) -> bool:
    """Whether someone has hooked a module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in hooks)


register_fusion("leff", LocallyEnhancedFeedForward, FusedLeFF.from_plain)
register_fusion("lca", LCAAttention, FusedLCAAttention.from_plain)
register_fusion("i2t", Image2Tokens, FusedImage2Tokens.from_plain)
register_fusion("norm", AddNorm, FusedAddNorm.from_plain)
register_fusion("linear", nn.Linear, FusedLinear.from_plain)
register_fusion("linear", PatchProjection, FusedPatchProjection.from_plain)
register_fusion("attention", Attention, FusedAttention.from_plain)
