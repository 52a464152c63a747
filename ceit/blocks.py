"""The two kinds of transformer block of CeiT: the encoder's, and the one over class tokens."""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ceit_kernels import FusedAddNorm, FusedAttention, FusedLeFF
from ceit_kernels.block import EncoderParts, LayersParts, encoder_inference, layers_inference

from .layers import AddNorm, Attention, LCAAttention, LocallyEnhancedFeedForward, is_watched

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
        self.add_norm = AddNorm()

    def forward(
        self, x: Tensor, grid_size: tuple[int, int] | None = None, with_class_token: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode tokens (B, 1 + H * W, dim) of a grid (H, W), square if None.

        With `with_class_token` also return the class token (B, 1, dim) of the argument `x`, see `passes_class_token`.
        """
        if not with_class_token and not torch.is_grad_enabled() and (out := self._at_once(x, grid_size)) is not None:
            return out
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, self.drop_path(self.attn(y)), self.norm2)
        if self.training and not isinstance(self.drop_path, nn.Identity):
            x = x + self.drop_path(self.leff(y, grid_size))
        else:
            x = self.leff(y, grid_size, residual=x)
        return (x, class_token) if with_class_token else x

    def _at_once(self, x: Tensor, grid_size: tuple[int, int] | None) -> Tensor | None:
        """The block in one compiled call, None where it takes a call for every part."""
        found = encoder_inference(x, (self,), _encoder_parts, grid_size)
        return None if found is None else found[0]

    def passes_class_token(self) -> bool:
        """Whether to take the class token of this block's input from its `forward`, instead of from the input itself.

        The fused norm adds that token's gradient to the others in its own pass, which slicing would cost four. Hooks
        of the block get to see what they expect, a result without it.
        """
        return type(self.add_norm) is FusedAddNorm and torch.is_grad_enabled() and not is_watched(self)

    def forward_class_token(
        self, x: Tensor, grid_size: tuple[int, int] | None = None, with_class_token: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The class token (B, 1, dim) of what `forward` returns, for where no other token is used.

        At inference no other token is computed. In training the others count for LeFF's batch statistics and for
        nothing else: to rounding, values, gradients and buffers are those of `forward`, and gradients of zero come for
        free.
        """
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        if not any(module.training for module in self.modules()):
            out, y = self.add_norm(class_token, self.attn(y, num_queries=1), self.norm2)
            out = out + y
            return (out, class_token) if with_class_token else out
        if self._attends_for_class_token():
            every, first = self.attn.forward_first(y, 1)
            kept = self.drop_path(y.new_ones(y.shape[0], 1, 1))
            with torch.no_grad():
                _, normalised = self.add_norm(x, kept * every, self.norm2)
            x, class_normalised = self.add_norm(class_token, kept * first, self.norm2)
        else:
            x, normalised = self.add_norm(x, self.drop_path(self.attn(y)), self.norm2)
            x, class_normalised = x[:, :1], normalised[:, :1]
        if any(isinstance(module, _BatchNorm) and module.training for module in self.leff.modules()):
            with torch.no_grad():
                self.leff(normalised, grid_size)
        out = x + self.drop_path(_Unused.apply(class_normalised, *self.leff.parameters()))
        return (out, class_token) if with_class_token else out

    def _attends_for_class_token(self) -> bool:
        """Whether the attention of the other tokens, which only counts for statistics, can go without a gradient."""
        attention = self.attn
        if type(attention) is not FusedAttention or not torch.is_grad_enabled():
            return False
        return not (attention.attn_drop.p or attention.proj_drop.p)

    def class_token_suffices(self) -> bool:
        """Whether `forward_class_token` may stand in for `forward` where only the class token is used.

        It may not where a hook or someone else's module would miss the other tokens. Gradients in evaluation mode are
        left to `forward` as well, for the shorter way would round them otherwise.
        """
        own_attention = type(self.attn) in (Attention, FusedAttention)
        own_parts = own_attention and type(self.leff) in (LocallyEnhancedFeedForward, FusedLeFF)
        watched = any(is_watched(module) for module in self.modules())
        return own_parts and not watched and (self.training or not torch.is_grad_enabled())


def encode_at_once(
    x: Tensor, blocks: Sequence[nn.Module], grid_size: tuple[int, int], class_token_only: bool
) -> tuple[Tensor, Tensor] | None:
    """Run several blocks by one compiled call each, None where they take a call for every part.

    Returns:
        The last block's tokens (B, 1 + N, dim), or (B, 1, dim) with `class_token_only`; every block's class token
        (B, len(blocks), dim).
    """
    if torch.is_grad_enabled() or not all(type(block) is Block for block in blocks):
        return None
    found = encoder_inference(x, blocks, _encoder_parts, grid_size, class_token_only)
    if found is None and class_token_only and len(blocks) > 1 and blocks[-1].class_token_suffices():
        found = encoder_inference(x, blocks[:-1], _encoder_parts, grid_size)
        if found is not None:
            out = blocks[-1].forward_class_token(found[0], grid_size)
            return out, torch.cat((found[1], out), dim=1)
    return found


def _encoder_parts(block: Block) -> EncoderParts | None:
    if type(block.add_norm) is not FusedAddNorm or type(block.drop_path) not in (DropPath, nn.Identity):
        return None
    return EncoderParts(block.norm1, block.attn, block.norm2, block.leff)


class _Unused(torch.autograd.Function):
    """Pass a tensor on, with gradients of zero for parameters that it does not depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grad, *(torch.zeros_like(parameter) if need else None for parameter, need in needed)


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
        if not torch.is_grad_enabled() and (out := self._at_once(x)) is not None:
            return out
        x = x[:, -1:] + self.attn(self.norm1(x))
        return x + self.feedforward(self.norm2(x))

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The block in one compiled call, None where it takes a call for every part."""
        mlp = self.feedforward
        if type(mlp) is not Mlp or type(mlp.norm) is not nn.Identity:
            return None
        parts = LayersParts(self.norm1, self.attn, self.norm2, mlp.fc1, mlp.act, mlp.fc2)
        return layers_inference(x, self, parts)
