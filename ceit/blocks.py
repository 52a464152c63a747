"""CeiT's two transformer blocks: the encoder block, and the block over class tokens (LCA)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ceit_kernels import FusedAddNorm, FusedAttention, FusedLCAAttention, FusedLeFF, FusedLinear
from ceit_kernels.adapters.timm_mlp import Mlp as FusedMlp
from ceit_kernels.block import EncoderParts, LayersParts, encoder_inference, encoder_training, layers_inference
from ceit_kernels.common.children import declare_methods, has_own_methods, held, is_patched
from ceit_kernels.common.given import linear_given
from ceit_kernels.common.module import is_made
from ceit_kernels.common.sync_norm import BATCH_NORMS
from ceit_kernels.leff import update_statistics
from ceit_kernels.tokens import join_layers

from .layers import AddNorm, Attention, LCAAttention, LocallyEnhancedFeedForward
from .shortcuts import is_eager, is_exactly, is_left_alone, is_symbolic

NormLayer = Callable[[int], nn.Module]


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
            class_token_only: return the class token (B, 1, dim) alone, if no other token is used.

        At inference `class_token_only` computes no other token. In training the other tokens only enter LeFF's batch
        statistics: values, gradients and buffers equal those of the whole block to rounding, and the gradients that
        are zero cost nothing.
        """
        if torch.jit.is_scripting():
            return self._unfused(x, grid_size, class_token_only)
        return self._forward(x, grid_size, class_token_only)

    def _unfused(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor:
        """The block part by part, as TorchScript and torch.fx record it."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.leff(self.norm2(x), grid_size))
        return x[:, :1] if class_token_only else x

    @torch.jit.unused
    def _forward(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor:
        if is_symbolic(x):
            return self._unfused(x, grid_size, class_token_only)
        out = None if torch.is_grad_enabled() else self._fused(x, grid_size, class_token_only)
        return self.forward_with_class_token(x, grid_size, class_token_only)[0] if out is None else out

    def forward_with_class_token(
        self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool
    ) -> tuple[Tensor, Tensor]:
        """The result of `forward`, and the class token (B, 1, dim) of `x`; see `passes_class_token`."""
        if not class_token_only:
            return self._every_token(x, grid_size)
        x, branch, class_token = self.class_token_halves(x, grid_size)
        return x + branch, class_token

    def passes_class_token(self) -> bool:
        """Whether the block should return the class token of its input, so that the caller need not slice it.

        The fused norm adds the gradient of that token in its own pass; the gradient of a slice takes four passes.
        """
        return torch.is_grad_enabled() and not torch.jit.is_tracing() and self.is_fused()

    def is_fused(self) -> bool:
        """Whether the residual connections are added by fused norms."""
        return is_exactly(self.add_norm, FusedAddNorm)

    def class_token_suffices(self) -> bool:
        """Whether the block may compute the class token alone if no other token is used.

        It may not if a hook or an unknown module has to see the other tokens. In evaluation mode with gradients the
        whole block runs too, because the short way rounds them differently. While torch.jit.trace runs, gradients are
        ignored: it records one graph for both modes and compares them.
        """
        own_parts = type(self.attn) in (Attention, FusedAttention) and type(self.leff) in (
            LocallyEnhancedFeedForward,
            FusedLeFF,
        )
        known = all(type(module) in _KNOWN and is_left_alone(module) for module in self.modules())
        wants_gradient = torch.is_grad_enabled() and not torch.jit.is_tracing()
        return own_parts and known and (self.training or not wants_gradient)

    def _fused(self, x: Tensor, grid_size: tuple[int, int] | None, class_token_only: bool) -> Tensor | None:
        """The block in one compiled call; None if its parts have to be called one by one."""
        if not is_eager(x):
            return None
        found = encoder_inference(x, (self,), encoder_parts, grid_size, class_token_only)
        return None if found is None else found[0]

    def _every_token(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        found = self._trained(x, grid_size) if torch.is_grad_enabled() and is_eager(x) else None
        return self._by_operators(x, grid_size) if found is None else found

    def _by_operators(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, self.drop_path(self.attn(y)), self.norm2)
        if _is_idle(self.drop_path):
            x = self.leff(y, grid_size, residual=x)
        else:
            x = x + self.drop_path(self.leff(y, grid_size))
        return x, class_token

    def _trained(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor] | None:
        """The block with gradients in one compiled call; None if its parts have to be called one by one."""
        drop_path = self.drop_path
        if not is_exactly(drop_path, DropPath) or not drop_path.training:
            return encoder_training(x, encoder_parts(self), grid_size)
        return encoder_training(
            x, _parts_beside(self, True), grid_size, lambda: drop_path(x.new_ones(x.shape[0], 1, 1))
        )

    def class_token_halves(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The block's class token (B, 1, dim) as two that are to be added, and the class token of `x`."""
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        if not any(module.training for module in self.modules()):
            out, y = self.add_norm(class_token, self.attn(y, num_queries=1), self.norm2)
            return out, y, class_token
        if _attends_first(self.attn, y):
            every, first = self.attn.forward_first(y, 1)
            if not isinstance(self.drop_path, nn.Identity):
                kept = self.drop_path(y.new_ones(y.shape[0], 1, 1))
                every, first = kept * every, kept * first
            with torch.no_grad():
                _, normalised = self.add_norm(x, every, self.norm2)
            x, class_normalised = self.add_norm(class_token, first, self.norm2)
        else:
            x, normalised = self.add_norm(x, self.drop_path(self.attn(y)), self.norm2)
            x, class_normalised = x[:, :1], normalised[:, :1]
        takes = any(isinstance(module, _BatchNorm) and module.training for module in self.leff.modules())
        if takes and is_eager(normalised) and is_exactly(self.leff, FusedLeFF):
            takes = not update_statistics(self.leff, normalised, grid_size)
        if takes:
            with torch.no_grad():
                self.leff(normalised, grid_size)
        return x, self.drop_path(_with_gradients_of_zero(class_normalised, self.leff.parameters())), class_token


declare_methods(
    Block,
    "_forward",
    "_fused",
    "forward_with_class_token",
    "_every_token",
    "_by_operators",
    "class_token_halves",
    "_trained",
)

# The classes of a block's parts that do not mind missing some of the tokens.
_KNOWN = {
    *(Block, AddNorm, FusedAddNorm, Attention, FusedAttention, LocallyEnhancedFeedForward, FusedLeFF),
    *(nn.Linear, FusedLinear, nn.Conv2d, *BATCH_NORMS, nn.LayerNorm, nn.GELU),
    *(nn.Dropout, DropPath, nn.Identity),
}


def encoder_parts(block: Block) -> EncoderParts | None:
    """The children that compute a block without stochastic depth; None if other modules do so too."""
    return _parts_beside(block, _is_idle(block.drop_path))


def _is_idle(drop_path: nn.Module) -> bool:
    """Whether calling it returns what it is given."""
    return is_exactly(drop_path, nn.Identity) or (is_exactly(drop_path, DropPath) and not drop_path.training)


def _parts_beside(block: Block, known: bool) -> EncoderParts | None:
    """The children beside stochastic depth, where that is known."""
    if not known or not is_exactly(block.add_norm, FusedAddNorm) or not _computes_as_written(block):
        return None
    return EncoderParts(block.norm1, block.attn, block.norm2, block.leff)


def _attends_first(attention: nn.Module, x: Tensor) -> TypeGuard[FusedAttention]:
    """Whether the tokens behind the first, which only enter statistics, can be attended to without a gradient."""
    if type(attention) is not FusedAttention or not torch.is_grad_enabled():
        return False
    runs_fused = torch.compiler.is_compiling() or is_eager(x)
    return runs_fused and not (attention.attn_drop.p or attention.proj_drop.p)


def _with_gradients_of_zero(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return `x` unchanged, and give `parameters`, on which it does not depend, gradients of zero."""
    parameters = list(parameters)
    if torch.is_grad_enabled() and all(map(is_eager, (x, *parameters))):
        return _GradientsOfZero.apply(x, *parameters)
    nothing = [parameter.flatten()[:0] for parameter in parameters]
    return x + torch.cat(nothing).sum() if nothing else x


class _GradientsOfZero(torch.autograd.Function):
    """Gradients in one piece of memory, so that one kernel fills them all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.parameters)
        wanted = [i for i in range(len(found)) if ctx.needs_input_grad[1 + i]]
        for kind in {ctx.parameters[i][1:] for i in wanted}:
            places = [i for i in wanted if ctx.parameters[i][1:] == kind]
            padded = [-(-ctx.parameters[i][0].numel() // _ALIGNED) * _ALIGNED for i in places]
            memory, start = torch.zeros(sum(padded), dtype=kind[0], device=kind[1]), 0
            for i, size in zip(places, padded, strict=True):
                # No view, since a user may detach a gradient in place.
                shape = ctx.parameters[i][0]
                strides = torch.empty(shape, device="meta").stride()
                found[i] = memory.new_empty(0).set_(memory.untyped_storage(), start, shape, strides)
                start += size
        return grads[0], *found


_ALIGNED = 32  # numbers, so that each piece starts where a tensor of its own might


class LCABlock(nn.Module):
    """Layer-wise class-token attention (section 3.4): the last class token gathers from those of all layers.

    Shapes:
        (B, L, dim) -> (B, 1, dim).
    """

    __jit_ignored_attributes__ = ("add_norm",)  # as of Block

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
        # Registered in the same order as in Block.
        self.norm2 = norm_layer(dim)
        self.norm1 = norm_layer(dim)
        self.attn = LCAAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.feedforward = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=proj_drop)
        self.add_norm = AddNorm()

    def forward(self, x: Tensor) -> Tensor:
        """Reduce class tokens (B, L, dim) to one (B, 1, dim)."""
        if torch.jit.is_scripting():
            return self._unfused(x)
        return self._forward(x)

    def _unfused(self, x: Tensor) -> Tensor:
        """The block part by part, as TorchScript and torch.fx record it."""
        x = x[:, -1:] + self.attn(self.norm1(x))
        return x + self.feedforward(self.norm2(x))

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if is_symbolic(x):
            return self._unfused(x)
        out = self._fused(x)
        if out is None:
            x, branch = self._halves(x, {})
            out = x + branch
        return out

    def normalised(self, tokens: list[Tensor], added: Tensor | None, positions: Tensor, norm: nn.Module) -> Tensor:
        """What `norm` makes of the result of `forward`, with the sum that ends the block in the norm's pass.

        Args:
            tokens: the class tokens in parts (B, ..., dim).
            added: to the last part, or None.
            positions: (1, L, dim), to be added to them.
            norm: of the result.
        """
        fused = is_exactly(self.add_norm, FusedAddNorm)
        joined = join_layers(tokens, added, positions, self._linears) if fused else None
        x, given = (in_a_row(tokens, added) + positions, {}) if joined is None else joined
        out = self._fused(x)
        return self._added(*self._halves(x, given), norm)[1] if out is None else norm(out)

    def _linears(self) -> list[nn.Module]:
        """The linear layers, where calling them one by one is calling the modules that they are of."""
        attn, mlp = self.attn, self.feedforward
        if not is_exactly(attn, FusedLCAAttention) or not _is_mlp(mlp) or not _computes_as_written(self):
            return []
        layers = attn.proj, mlp.fc1, mlp.fc2
        return [layer for layer in layers if is_exactly(layer, nn.Linear) or is_exactly(layer, FusedLinear)]

    def _halves(self, x: Tensor, given: Mapping[nn.Module, Tensor]) -> tuple[Tensor, Tensor]:
        """The asking token behind attention, and the feed-forward half, which is to be added.

        Of the linear layers in `given` the biases' gradients are taken where the layers' tokens are put together.
        """
        attn: Any = self.attn
        mlp = self.feedforward
        _, y, last = self.add_norm(x, None, self.norm1, -1)
        attended = attn.attend(y) if given else None
        y = attn(y) if attended is None else attn.proj_drop(_call(attn.proj, attended, given))
        x, y = self._added(last, y, self.norm2)
        if given:
            y = mlp.norm(mlp.drop1(mlp.act(_call(mlp.fc1, y, given))))
            return x, mlp.drop2(_call(mlp.fc2, y, given))
        return x, mlp(y)

    def _added(self, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, ...]:
        """The sum and its norm. Someone else's module may give a branch for each of several tokens."""
        if branch.shape != x.shape:
            return self.add_norm(x + branch, None, norm)
        return self.add_norm(x, branch, norm)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The block in one compiled call; None if its parts have to be called one by one."""
        parts = None if torch.is_grad_enabled() or not is_eager(x) else layers_parts(self)
        return None if parts is None else layers_inference(x, parts)


declare_methods(LCABlock, "_forward", "_fused", "normalised", "_linears", "_halves", "_added")


def in_a_row(tokens: list[Tensor], added: Tensor | None) -> Tensor:
    """The parts of tokens (B, ..., dim) one behind another, with something added to the last."""
    tokens = tokens if added is None else tokens[:-1] + [tokens[-1] + added]  # noqa: RUF005 - TorchScript unpacks no list
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)


def _call(layer: nn.Module, x: Tensor, given: Mapping[nn.Module, Tensor]) -> Tensor:
    """A linear layer, whose bias's gradient is taken elsewhere if it is in `given`."""
    if layer not in given:
        return layer(x)
    return linear_given(x, held(layer, "weight"), held(layer, "bias"), given[layer])


def _computes_as_written(block: nn.Module) -> bool:
    return has_own_methods(block) and not is_patched(type(block))


def _is_mlp(module: nn.Module) -> TypeGuard[Mlp]:
    """Whether calling a module runs the `forward` of timm's MLP, plain or fused, and no hook."""
    fused = isinstance(module, FusedMlp) and is_made(type(module))
    plain = getattr(module, "plain_class", None) if fused else type(module)
    return plain is Mlp and is_exactly(module, type(module))


def layers_parts(block: LCABlock) -> LayersParts | None:
    """The parts of a block over class tokens; None if a call of the block does more than they do."""
    mlp = block.feedforward
    if not _is_mlp(mlp) or type(mlp.norm) is not nn.Identity or not _computes_as_written(block):
        return None
    dropouts = (mlp.drop1, mlp.drop2, mlp.norm)
    return LayersParts(block.norm1, block.attn, block.norm2, mlp.fc1, mlp.act, mlp.fc2, dropouts)
