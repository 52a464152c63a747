"""The locally-enhanced feed-forward block as a module: the plain one, and the fused one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import backends
from ..common.children import children_reason, convolution_reason, held
from ..common.freezing import Prepacked, is_freezable, is_frozen_call
from ..common.module import Fusion, attributes_of
from .activations import MODULES, activation_name
from .arguments import NORM_TENSORS, kernel_size_unsupported_reason
from .cpu import in_compute_dtype, kernels, leff_sizes
from .functional import leff_fused, pack
from .grid import (
    LAYOUTS,
    check_grid_size,
    empty_tokens_like,
    from_tokens,
    in_memory_order,
    is_planar,
    residual_to_tokens,
    to_tokens,
    token_grid,
)
from .norms import of_module

__all__ = ["FrozenLeFF", "FusedLeFF", "LocallyEnhancedFeedForward"]

_CONVOLUTIONS = ("conv1", "conv2", "conv3")
_NORM = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)
_NAMES = tuple(
    name
    for i in (1, 2, 3)
    for name in (f"conv{i}.weight", f"conv{i}.bias", *(f"bn{i}.{tensor}" for tensor in NORM_TENSORS))
)
_CHILDREN = {
    **dict.fromkeys(_CONVOLUTIONS, (nn.Conv2d,)),
    **{f"bn{i}": _NORM for i in (1, 2, 3)},
    "act": MODULES,
}

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
        ValueError: an even kernel, prefix tokens that change width or precede an image, an unknown layout.
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
        *,
        bias: bool = True,
        first_act: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        layout: str = "tokens",
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
            # No transposed view: of one image PyTorch takes that for another memory format, and the norms' gradients
            # are wrong.
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
            z = z.flatten(2).transpose(1, 2)
            z = torch.cat((prefix, z), dim=1) if self.num_prefix_tokens else z
        elif self.layout == "NHWC":
            z = z.permute(0, 2, 3, 1)
        return z if residual is None else residual + z


class LeFFFusion(Fusion, attributes_of(LocallyEnhancedFeedForward)):
    """``forward`` of the locally-enhanced feed-forward block, fused."""

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
        reason = self.plain_reason()
        if reason is None:
            where = (self._activations(), grid_size, self.num_prefix_tokens, residual, self.layout)
            out = leff_fused(x, *self._tensors(), *where, _NAMES)
            if out is not None:
                return out
        else:
            backends.leave_to_reference("leff", reason)
        return super().forward(x, grid_size, residual)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor | None], list]:
        """Weights and biases of the convolutions, and what the norms compute with."""
        weights, biases = ([held(each, name) for each in self._convolutions()] for name in ("weight", "bias"))
        return weights, biases, [of_module(norm) for norm in (self.bn1, self.bn2, self.bn3)]

    def _convolutions(self) -> list[nn.Conv2d]:
        return cast("list[nn.Conv2d]", [self._modules[name] for name in _CONVOLUTIONS])

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, _CHILDREN)
        if reason is not None:
            return reason
        convolutions = self._convolutions()
        weight1, weight2, weight3 = [held(convolution, "weight") for convolution in convolutions]
        hidden, side = weight2.shape[0], weight2.shape[-1]
        shapes = ((hidden, weight1.shape[1], 1, 1), (hidden, 1, side, side), (weight3.shape[0], hidden, 1, 1))
        if (weight1.shape, weight2.shape, weight3.shape) != shapes:
            return "the convolutions are not a pointwise, a depthwise and a pointwise one that follow each other"
        return (
            convolution_reason("conv1", convolutions[0], (1, 1), (0, 0))
            or convolution_reason("conv2", convolutions[1], (1, 1), (side // 2, side // 2), hidden)
            or convolution_reason("conv3", convolutions[2], (1, 1), (0, 0))
            or kernel_size_unsupported_reason(weight2)
        )

    def inference_parts(self) -> tuple[list[Tensor | None], tuple[float, ...], tuple[str, str]] | None:
        """What inference by the kernels takes: tensors in the operators' order, eps of the norms, activations.

        None where a norm takes batch statistics or the kernels do not serve the module.
        """
        if self.plain_reason() is not None:
            return None
        weights, biases, norms = self._tensors()
        if any(norm is not None and norm.training for norm in norms):
            return None
        return pack(weights, biases, norms), tuple([norm.eps if norm else 0.0 for norm in norms]), self._activations()

    def _activations(self) -> tuple[str, str]:
        activation = activation_name(self.act)
        return (activation if self.first_act else "identity", activation)


class FusedLeFF(LeFFFusion, LocallyEnhancedFeedForward):
    """Locally-enhanced feed-forward block (CeiT, section 3.3), fused.

    Constructor, children and state_dict are the plain module's. The kernels have the activations GELU, SiLU, ReLU,
    ReLU6, Hardswish and Identity, and the norms BatchNorm2d and SyncBatchNorm; another runs by plain PyTorch. An image
    in layout "NCHW" costs no copy where it is channels-last in memory.
    """


class FrozenLeFF(Prepacked, FusedLeFF):
    """A block of a frozen model: norms folded, and prepacked on the CPU. Made by ``freeze`` alone."""

    @staticmethod
    def freeze(module: nn.Module) -> None:
        """Make one of a fused block whose tensors do not change any more; on a GPU fold its norms."""
        if type(module) is not FusedLeFF:
            return
        parts = module.inference_parts()
        if parts is None:
            return
        weight = module.conv1.weight
        if is_freezable("leff", module, weight):
            module.__class__ = FrozenLeFF
            parameters, eps, activations = parts
            parameters = in_compute_dtype(parameters, weight.dtype)
            sizes = leff_sizes(parameters, activations, (1, 1))  # prepacking does not depend on the grid
            module.__dict__["_prepacked"] = kernels._leff_prepack(weight, parameters, eps, sizes), eps, sizes[:-2]
        elif weight.is_cuda:
            fold_norms(module)

    def _fused_forward(self, x: Tensor, grid_size: tuple[int, int] | None, residual: Tensor | None) -> Tensor:
        weight = self.conv1.weight
        added = residual is None or (residual.dtype, residual.device) == (x.dtype, x.device)
        if not (added and x.numel() and is_frozen_call("leff", self, x, weight)):
            return super()._fused_forward(x, grid_size, residual)
        prepacked, eps, sizes = self._prepacked
        tokens, grid = to_tokens(x, sizes[0], self.layout, self.num_prefix_tokens, grid_size)
        planar = self.num_prefix_tokens == 0 and is_planar(tokens)
        if residual is not None:
            residual = in_memory_order(residual_to_tokens(residual, tokens, sizes[2], self.layout, grid), planar)
        out = empty_tokens_like(tokens, sizes[2], x.dtype, planar)
        kernels._leff_infer(in_memory_order(tokens, planar), [], prepacked, residual, eps, [*sizes, *grid], out)
        return from_tokens(out, self.layout, grid, x)


@torch.no_grad()
def fold_norms(module: LocallyEnhancedFeedForward) -> None:
    """Put each norm of a block in evaluation mode into a copy of the convolution before it, which may have others."""
    for i in (1, 2, 3):
        convolution, norm = getattr(module, f"conv{i}"), of_module(getattr(module, f"bn{i}"))
        if norm is None:
            continue
        convolution = copy.deepcopy(convolution)
        dtype = convolution.weight.dtype
        acc_dtype = torch.promote_types(dtype, torch.float32)
        tensors = (convolution.weight, convolution.bias, *norm[:4])
        exact: list[Any] = [None if tensor is None else tensor.to(acc_dtype) for tensor in tensors]
        weight, bias, mean, var, *affine = exact
        folded = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, *affine)
        for name, tensor in zip(("weight", "bias"), folded, strict=True):
            convolution._parameters.pop(name, None)
            convolution.register_buffer(name, tensor.detach().to(dtype))
        setattr(module, f"conv{i}", convolution)
        setattr(module, f"bn{i}", nn.Identity())
