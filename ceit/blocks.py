"""The two kinds of transformer block of CeiT: the encoder's, and the one over class tokens."""

from collections.abc import Callable, Iterable

import torch
from timm.layers import DropPath, Mlp, register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ceit_kernels import FusedAddNorm, FusedAttention, FusedLeFF, FusedLinear
from ceit_kernels.block import EncoderParts, LayersParts, encoder_inference, layers_inference

from .layers import AddNorm, Attention, LCAAttention, LocallyEnhancedFeedForward
from .shortcuts import is_eager, is_exactly, is_left_alone, is_symbolic

NormLayer = Callable[[int], nn.Module]


@register_notrace_module
class Block(nn.Module):
    """Encoder block: self-attention, then LeFF, each on normalised tokens with a residual connection.

    The class token passes LeFF unchanged, so the second half adds its own LayerNorm to it.

    Shapes:
        (B, 1 + H * W, dim) -> (B, 1 + H * W, dim).
    """

    # It takes a norm as an argument, which TorchScript cannot pass.
    __jit_ignored_attributes__ = ("add_norm",)

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

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, class_token_only: bool = False) -> Tensor:
        """Encode tokens.

        Args:
            x: tokens (B, 1 + H * W, dim).
            grid_size: (H, W); a square if None.
            class_token_only: return the class token (B, 1, dim) alone, for where no other token is used.

        At inference `class_token_only` computes no other token. In training the others count for LeFF's batch
        statistics and for nothing else: to rounding, values, gradients and buffers are those of the whole block, and
        gradients of zero come for free.
        """
        if torch.jit.is_scripting():
            return self._in_turn(x, grid_size, class_token_only)
        return self._forward(x, grid_size, class_token_only)

    def _in_turn(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor:
        """The block without a shortcut, which TorchScript and torch.fx can record."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.leff(self.norm2(x), grid_size))
        return x[:, :1] if class_token_only else x

    @torch.jit.unused
    def _forward(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor:
        if is_symbolic(x):
            return self._in_turn(x, grid_size, class_token_only)
        out = None if torch.is_grad_enabled() else self._at_once(x, grid_size, class_token_only)
        return self.forward_with_class_token(x, grid_size, class_token_only)[0] if out is None else out

    def forward_with_class_token(
        self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the class token (B, 1, dim) of its argument `x`, see `passes_class_token`."""
        return self._class_token(x, grid_size) if class_token_only else self._every_token(x, grid_size)

    def passes_class_token(self) -> bool:
        """Whether to take the class token of this block's input from the block, instead of from the input itself.

        The fused norm adds that token's gradient to the others in its own pass, which slicing would cost four.
        """
        wants_gradient = torch.is_grad_enabled() and not torch.jit.is_tracing()
        return wants_gradient and is_exactly(self.add_norm, FusedAddNorm)

    def class_token_suffices(self) -> bool:
        """Whether the block may be asked for the class token alone where no other token is used.

        It may not where a hook or someone else's module would miss the other tokens. Gradients in evaluation mode are
        left to the whole block as well, for the shorter way would round them otherwise. torch.jit.trace records one
        graph with and without gradients, which it compares.
        """
        own_parts = type(self.attn) in (Attention, FusedAttention) and type(self.leff) in (
            LocallyEnhancedFeedForward,
            FusedLeFF,
        )
        known = all(type(module) in _KNOWN and is_left_alone(module) for module in self.modules())
        wants_gradient = torch.is_grad_enabled() and not torch.jit.is_tracing()
        return own_parts and known and (self.training or not wants_gradient)

    def _at_once(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor | None:
        """The block in one compiled call, None where it takes a call for every part."""
        if not is_eager(x):
            return None
        found = encoder_inference(x, (self,), encoder_parts, grid_size, class_token_only)
        return None if found is None else found[0]

    def _every_token(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, self.drop_path(self.attn(y)), self.norm2)
        if self.training and not isinstance(self.drop_path, nn.Identity):
            x = x + self.drop_path(self.leff(y, grid_size))
        else:
            x = self.leff(y, grid_size, residual=x)
        return x, class_token

    def _class_token(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        if not any(module.training for module in self.modules()):
            out, y = self.add_norm(class_token, self.attn(y, num_queries=1), self.norm2)
            return out + y, class_token
        if self._attends_for_class_token(y):
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
        return x + self.drop_path(_with_gradients_of_zero(class_normalised, self.leff.parameters())), class_token

    def _attends_for_class_token(self, x: Tensor) -> bool:
        """Whether the attention of the other tokens, which only counts for statistics, can go without a gradient."""
        attention = self.attn
        if type(attention) is not FusedAttention or not torch.is_grad_enabled():
            return False
        runs_fused = torch.compiler.is_compiling() or is_eager(x)
        return runs_fused and not (attention.attn_drop.p or attention.proj_drop.p)


# What a block is made of: of these it is known what becomes of tokens that they do not get to see.
_KNOWN = {
    *(Block, AddNorm, FusedAddNorm, Attention, FusedAttention, LocallyEnhancedFeedForward, FusedLeFF),
    *(nn.Linear, FusedLinear, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm, nn.GELU),
    *(nn.Dropout, DropPath, nn.Identity),
}


def encoder_parts(block: Block) -> EncoderParts | None:
    """The children that do all that a block does at inference; None if others do too."""
    drop_path = block.drop_path
    idle = is_exactly(drop_path, nn.Identity) or (is_exactly(drop_path, DropPath) and not drop_path.training)
    if not idle or not is_exactly(block.add_norm, FusedAddNorm):
        return None
    return EncoderParts(block.norm1, block.attn, block.norm2, block.leff)


def _with_gradients_of_zero(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Pass a tensor on, with gradients of zero for parameters that it does not depend on."""
    nothing = [parameter.flatten()[:0] for parameter in parameters]
    return x + torch.cat(nothing).sum() if nothing else x


@register_notrace_module
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
        if not torch.jit.is_scripting():
            out = self._at_once(x)
            if out is not None:
                return out
        x = x[:, -1:] + self.attn(self.norm1(x))
        return x + self.feedforward(self.norm2(x))

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The block in one compiled call, None where it takes a call for every part."""
        parts = None if torch.is_grad_enabled() or not is_eager(x) else layers_parts(self)
        return None if parts is None else layers_inference(x, parts)


def layers_parts(block: LCABlock) -> LayersParts | None:
    """What a block over class tokens is made of; None where a call of it does more."""
    mlp = block.feedforward
    if not is_exactly(mlp, Mlp) or type(mlp.norm) is not nn.Identity:
        return None
    dropouts = (mlp.drop1, mlp.drop2, mlp.norm)
    return LayersParts(block.norm1, block.attn, block.norm2, mlp.fc1, mlp.act, mlp.fc2, dropouts)
