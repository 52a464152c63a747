"""The locally-enhanced feed-forward block as a module: the plain one, and the fused one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..common.arguments import check_at_least, names_its_arguments
from ..common.module import attributes_of
from .functional import leff_fused
from .fusion import BlockFusion, BlockParts, FrozenBlock
from .grid import LAYOUTS, check_grid_size, token_grid
from .norms import folded, of_module

__all__ = ["FrozenLeFF", "FusedLeFF", "LocallyEnhancedFeedForward", "update_statistics"]

# A call of it is a node in graphs of torch.fx, which cannot compare sizes.
torch.fx.wrap("token_grid")


class LocallyEnhancedFeedForward(nn.Module):
    """Locally-enhanced feed-forward layer (CeiT, section 3.3): expand, depthwise convolution on the grid, contract.

    Patch tokens take the place of pixels; prefix tokens (the class token) pass unchanged. Each of the three
    convolutions is followed by a norm, the first two also by the activation. Without norms, first activation and prefix
    tokens it is the Mix-FFN of SegFormer and PVTv2.

    Args:
        in_features: channels C of a token.
        hidden_features: channels E between the pointwise convolutions, by default C.
        out_features: channels O of the result, by default C; equal to C where there are prefix tokens.
        kernel_size: side of the depthwise kernel, odd.
        with_bn: a norm after each convolution.
        act_layer: makes the activation after the first and the second convolution.
        num_prefix_tokens: tokens before the image's (class tokens), which pass through unchanged.
        bias: give the convolutions biases.
        first_act: whether the activation follows the first convolution too.
        norm_layer: makes a norm over so many channels.
        layout: what comes in and goes out: "tokens" (B, P + H * W, C), or an image, "NHWC" (B, H, W, C) or "NCHW"
            (B, C, H, W). An image has no prefix tokens.

    Raises:
        ValueError, TypeError: an even kernel, no channels, prefix tokens that change width or precede an image, an
            unknown layout.
    """

    @names_its_arguments
    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        kernel_size: int = 3,
        with_bn: bool = True,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        num_prefix_tokens: int = 1,
        *,
        bias: bool = True,
        first_act: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        layout: str = "tokens",
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, hidden_features=hidden_features, out_features=out_features)
        check_at_least(0, num_prefix_tokens=num_prefix_tokens)
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if num_prefix_tokens and out_features != in_features:
            raise ValueError(
                f"out_features: expected in_features={in_features}, which prefix tokens keep, got {out_features}"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if num_prefix_tokens and layout != "tokens":
            raise ValueError(f"num_prefix_tokens: expected 0 with layout {layout!r}, got {num_prefix_tokens}")
        self.num_prefix_tokens = num_prefix_tokens
        self.first_act = first_act
        self.layout = layout
        self.conv1 = nn.Conv2d(in_features, hidden_features, kernel_size=1, bias=bias)
        self.conv2 = nn.Conv2d(
            hidden_features, hidden_features, kernel_size, padding=kernel_size // 2, groups=hidden_features, bias=bias
        )
        self.conv3 = nn.Conv2d(hidden_features, out_features, kernel_size=1, bias=bias)
        self.act = act_layer()
        norm = norm_layer if with_bn else nn.Identity
        self.bn1 = norm(hidden_features)
        self.bn2 = norm(hidden_features)
        self.bn3 = norm(out_features)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Mix each patch token with its neighbours on the grid.

        Args:
            x: tokens (B, num_prefix_tokens + H * W, C), or an image as ``layout`` says.
            grid_size: (H, W) of tokens; a square if None.
            residual: of the result's shape, added to all of it; nothing if None.

        Returns:
            Tokens (B, num_prefix_tokens + H * W, O), or an image of O channels.

        Raises:
            ValueError, TypeError: the tokens make no such image, or ``grid_size`` is no pair of positive integers.
        """
        prefix, image = x[:, :0], x
        if self.layout == "tokens":
            height, width = token_grid(x.shape[1], self.num_prefix_tokens, grid_size)
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            # No transposed views, here and below: of one image PyTorch takes them for another memory format, and the
            # norms' gradients are wrong.
            image = patches.reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)
        else:
            image = image.permute(0, 3, 1, 2) if self.layout == "NHWC" else image
            if grid_size is not None:
                check_grid_size(grid_size, (image.shape[2], image.shape[3]))
        z = self.bn1(self.conv1(image))
        z = self.act(z) if self.first_act else z
        z = self.act(self.bn2(self.conv2(z)))
        z = self.bn3(self.conv3(z))
        if self.layout == "tokens":
            z = z.permute(0, 2, 3, 1).flatten(1, 2)
            z = torch.cat((prefix, z), dim=1) if self.num_prefix_tokens else z
        elif self.layout == "NHWC":
            z = z.permute(0, 2, 3, 1)
        return z if residual is None else residual + z


class LeFFFusion(BlockFusion, attributes_of(LocallyEnhancedFeedForward)):
    """``forward`` of the locally-enhanced feed-forward block, fused."""

    parts = BlockParts(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), ("act", "act"))

    # What a plain class that lacks these does.
    first_act = True
    layout = "tokens"

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Args:
            x: tokens (B, num_prefix_tokens + H * W, C), or an image as ``layout`` says, which costs no copy where it is
                channels-last in memory; the result is in memory as it is.
            grid_size: (H, W) of tokens; a square if None.
            residual: of the result's shape, added to all of it; nothing if None.

        Returns:
            Tokens (B, num_prefix_tokens + H * W, O), or an image of O channels.

        Raises:
            ValueError, TypeError: the tokens make no such image, or are not of the module's width, dtype or device;
                ``grid_size`` is no pair of positive integers; the residual is not of the result's shape; a batch has a
                single value to take statistics of.
            BackendError: the backend that was asked for cannot serve the call.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(x, grid_size, residual)
        return self._fused_forward(x, grid_size, residual)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor, grid_size: tuple[int, int] | None, residual: Tensor | None) -> Tensor:
        out = self._by_operator(x, grid_size, residual, self.layout, self.num_prefix_tokens)
        return super().forward(x, grid_size, residual) if out is None else out

    def _activations(self) -> tuple[str, str]:
        first, second = super()._activations()
        return (first if self.first_act else "identity"), second


class FusedLeFF(LeFFFusion, LocallyEnhancedFeedForward):
    """Locally-enhanced feed-forward block (CeiT, section 3.3), fused.

    Constructor, children and state_dict are the plain module's. The kernels have the activations GELU, SiLU, ReLU,
    ReLU6, Hardswish and Identity, and the norms BatchNorm2d and SyncBatchNorm; another runs by plain PyTorch. An image
    in layout "NCHW" costs no copy where it is channels-last in memory.
    """


@torch.no_grad()
def update_statistics(leff: FusedLeFF, x: Tensor, grid_size: tuple[int, int] | None) -> bool:
    """What a call without gradients, of a block that has no hook, does beside its result, on a GPU without the pass for
    that; whether it was done, or is left to the call.
    """
    if leff.plain_reason() is not None:
        return False
    where = leff._activations(), grid_size, leff.num_prefix_tokens, None, leff.layout
    return leff_fused(x, *leff._tensors(), *where, leff.parts.tensor_names, only_statistics=True) is not None


class FrozenLeFF(FrozenBlock, FusedLeFF):
    """A block of a frozen model: norms folded, and prepacked on the CPU. Made by ``freeze`` alone."""

    @classmethod
    def freeze(cls, module: nn.Module) -> None:
        """Freeze a fused block whose tensors do not change any more; on a GPU fold CeiT's norms."""
        if type(module) is FusedLeFF and module.conv1.weight.is_cuda and module.inference_parts() is not None:
            fold_norms(module)
        else:
            super().freeze(module)


@torch.no_grad()
def fold_norms(module: LocallyEnhancedFeedForward) -> None:
    """Put each norm of a block in evaluation mode into a copy of the convolution before it, which may have others."""
    for i in (1, 2, 3):
        convolution, norm = getattr(module, f"conv{i}"), of_module(getattr(module, f"bn{i}"))
        if norm is None:
            continue
        setattr(module, f"conv{i}", folded(convolution, norm))
        setattr(module, f"bn{i}", nn.Identity())
