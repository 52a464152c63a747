"""The two kinds of transformer block of CeiT: the encoder's, and the one over class tokens."""

from collections.abc import Callable

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from .layers import Attention, LCAAttention, LocallyEnhancedFeedForward

NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """Encoder block: self-attention, then LeFF, each on normalised tokens with a residual connection.

    The class token passes LeFF unchanged, so the second half adds its own LayerNorm to it.

    Shapes:
        (B, 1 + H * W, dim) -> (B, 1 + H * W, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        kernel_size: int = 3,
        with_bn: bool = True,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        # The published checkpoints' optimizer states number the parameters in this order: norm2 comes first.
        self.norm2 = norm_layer(dim)
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.leff = LocallyEnhancedFeedForward(
            dim, hidden_features=int(dim * mlp_ratio), kernel_size=kernel_size, with_bn=with_bn
        )

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Encode tokens (B, 1 + H * W, dim) of a grid (H, W), square if None."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.leff(self.norm2(x), grid_size))


class LCABlock(nn.Module):
    """Layer-wise class-token attention (section 3.4): the last class token gathers from those of all layers.

    Shapes:
        (B, L, dim) -> (B, 1, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
    ) -> None:
        super().__init__()
        # The order of registration is that of Block.
        self.norm2 = norm_layer(dim)
        self.norm1 = norm_layer(dim)
        self.attn = LCAAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.feedforward = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce class tokens (B, L, dim) to one (B, 1, dim)."""
        x = x[:, -1:] + self.attn(self.norm1(x))
        return x + self.feedforward(self.norm2(x))
