"""The module that a user drops in for a locally-enhanced feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.module import adopt
from .folding import forget
from .grid import token_grid
from .op import ACTIVATIONS, KERNEL_SIZES
from .reference import leff_reference

__all__ = ["FusedLeFF"]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)


class FusedLeFF(nn.Module):
    """Locally-enhanced feed-forward block (CeiT, section 3.3): convolutions over the image that the tokens make.

    Constructor, children and state_dict are the plain module's (``conv1``, ``bn1``, ``conv2``, ...).

    Args:
        in_features: channels C of a token.
        hidden_features: channels E between the pointwise convolutions, by default C.
        out_features: channels O of the result, by default C; equal to C where there are prefix tokens.
        kernel_size: side of the depthwise kernel, odd.
        with_bn: a BatchNorm after each convolution.
        act_layer: makes the activation after the first and the second convolution.
        num_prefix_tokens: tokens before the image's (class tokens), which pass through unchanged.

    Raises:
        ValueError: an even kernel, or prefix tokens that change width.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        kernel_size: int = 3,
        with_bn: bool = True,
        act_layer: type[nn.Module] = nn.GELU,
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
        self.num_prefix_tokens = num_prefix_tokens
        self.conv1 = nn.Conv2d(in_features, hidden_features, kernel_size=1)
        self.conv2 = nn.Conv2d(
            hidden_features, hidden_features, kernel_size, padding=kernel_size // 2, groups=hidden_features
        )
        self.conv3 = nn.Conv2d(hidden_features, out_features, kernel_size=1)
        self.act = act_layer()
        norm = nn.BatchNorm2d if with_bn else nn.Identity
        self.bn1 = norm(hidden_features)
        self.bn2 = norm(hidden_features)
        self.bn3 = norm(out_features)

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedLeFF:
        """A fused module over the state of a plain one, which has the same attributes and children."""
        convolutions = {f"conv{i}": nn.Conv2d for i in (1, 2, 3)}
        norms = {f"bn{i}": _NORMS for i in (1, 2, 3)}
        return adopt(cls, plain, ("num_prefix_tokens", "act"), convolutions | norms)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Args:
            x: (B, num_prefix_tokens + H * W, C).
            grid_size: (H, W); a square if None.

        Returns:
            (B, num_prefix_tokens + H * W, O).

        Raises:
            ValueError, TypeError: the tokens make no such image, or are not of the module's width, dtype or device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        check_input("x", x, self.conv1.weight, "conv1.weight", "B", "N", self.conv1.in_channels)
        grid_size = token_grid(x.shape[1], self.num_prefix_tokens, grid_size)
        activation = _activation_name(self.act)
        choice = backends.choose("leff", x, autocast_dtype(x) or x.dtype, self._limit(activation), self._phase(x))
        convolutions, norms = (self.conv1, self.conv2, self.conv3), (self.bn1, self.bn2, self.bn3)
        if choice.backend != "reference":
            parameters = [tensor for pair in zip(convolutions, norms, strict=True) for tensor in _parameters(*pair)]
            eps = [getattr(norm, "eps", 0.0) for norm in norms]
            settings = (*grid_size, self.num_prefix_tokens, activation, activation, None, choice.backend)
            return torch.ops.ceit.leff_inference(x, parameters, None, eps, *settings)
        return leff_reference(
            x,
            [convolution.weight for convolution in convolutions],
            [convolution.bias for convolution in convolutions],
            norms,
            self.act,
            grid_size,
            self.num_prefix_tokens,
        )

    def train(self, mode: bool = True) -> FusedLeFF:
        """Switch between training and inference, which also forgets the weights that were folded for inference."""
        forget(self.conv1.weight)
        return super().train(mode)

    def _phase(self, x: Tensor) -> str:
        if any(norm.training and not isinstance(norm, nn.Identity) for norm in (self.bn1, self.bn2, self.bn3)):
            return "training"
        differentiable = x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return "training" if differentiable and torch.is_grad_enabled() else "inference"

    def _limit(self, activation: str | None) -> str | None:
        if activation is None:
            return f"the kernels have no {type(self.act).__name__}, they have {', '.join(ACTIVATIONS)}"
        if self.conv2.kernel_size[0] not in KERNEL_SIZES:
            return f"the kernels take depthwise kernels of side {KERNEL_SIZES}, not {self.conv2.kernel_size[0]}"
        norms = (self.bn1, self.bn2, self.bn3)
        if any(not isinstance(norm, nn.Identity) and norm.running_mean is None for norm in norms):
            return "a BatchNorm without running statistics cannot be folded"
        return None


def _activation_name(activation: nn.Module) -> str | None:
    """What the kernels call an activation module; None for one that they do not have."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.Identity: "identity"}
    return names.get(type(activation))


def _parameters(convolution: nn.Conv2d, norm: nn.Module) -> list[Tensor | None]:
    """A layer's tensors in the order of the registered operator."""
    norm_tensors = ("weight", "bias", "running_mean", "running_var")
    return [convolution.weight, convolution.bias, *(getattr(norm, name, None) for name in norm_tensors)]
