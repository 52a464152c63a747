"""The module that a user drops in for a locally-enhanced feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import backends
from ..common.checks import check_input
from ..common.module import adopt
from .arguments import ACTIVATIONS, kernel_size_limit
from .folding import forget
from .functional import leff_fused, make_settings, pack, phase_of
from .grid import LAYOUTS, from_tokens, residual_to_tokens, to_tokens
from .norms import of_module
from .reference import leff_reference

__all__ = ["FusedLeFF"]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)


class FusedLeFF(nn.Module):
    """Locally-enhanced feed-forward block (CeiT, section 3.3): convolutions over the image that the tokens make.

    Constructor, children and state_dict are the plain module's (``conv1``, ``bn1``, ``conv2``, ...). Without norms,
    first activation and prefix tokens it is the Mix-FFN of SegFormer and PVTv2.

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
        norm_layer: makes a norm over so many channels. The kernels have BatchNorm2d and SyncBatchNorm; another runs by
            plain PyTorch.
        layout: what comes in and goes out: "tokens" (B, P + H * W, C), or an image, "NHWC" (B, H, W, C) or "NCHW"
            (B, C, H, W), which costs no copy where it is channels-last in memory. An image has no prefix tokens.

    Raises:
        ValueError: an even kernel, prefix tokens that change width or precede an image, an unknown layout.
    """

    # What a plain module that lacks these has.
    first_act = True
    layout = "tokens"

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

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedLeFF:
        """A fused module over the state of a plain one, which has the same attributes and children."""
        convolutions = {f"conv{i}": nn.Conv2d for i in (1, 2, 3)}
        norms = {f"bn{i}": _NORMS for i in (1, 2, 3)}
        return adopt(cls, plain, ("num_prefix_tokens", "act"), convolutions | norms)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Args:
            x: tokens (B, num_prefix_tokens + H * W, C), or an image as ``layout`` says.
            grid_size: (H, W) of tokens; a square if None.
            residual: of the result's shape, added to all of it; nothing if None.

        Returns:
            Tokens (B, num_prefix_tokens + H * W, O), or an image of O channels.

        Raises:
            ValueError, TypeError: the tokens make no such image, or are not of the module's width, dtype or device; the
                residual is not of the result's shape; a batch has a single value to take statistics of.
            BackendError: the backend that was asked for cannot serve the call.
        """
        x, grid_size = to_tokens(x, self.conv1.in_channels, self.layout, self.num_prefix_tokens, grid_size)
        check_input("x", x, self.conv1.weight, "conv1.weight", "B", "N", self.conv1.in_channels)
        if residual is not None:
            residual = residual_to_tokens(residual, x, self.conv3.out_channels, self.layout, grid_size)
        out = self._forward_tokens(x, grid_size, residual)
        return from_tokens(out, self.layout, grid_size)

    def _forward_tokens(self, x: Tensor, grid_size: tuple[int, int], residual: Tensor | None) -> Tensor:
        convolutions, norm_modules = (self.conv1, self.conv2, self.conv3), (self.bn1, self.bn2, self.bn3)
        weights = [convolution.weight for convolution in convolutions]
        biases = [convolution.bias for convolution in convolutions]
        limit = self._limit()
        norms = [of_module(norm) if limit is None else None for norm in norm_modules]
        parameters = pack(weights, biases, norms)
        activations = self._activations()
        settings, group_limit = make_settings(x, norms, activations, grid_size, self.num_prefix_tokens)
        phase = phase_of(norms, (x, residual, *parameters))
        choice = backends.choose("leff", x, settings.compute_dtype or x.dtype, limit or group_limit, phase)
        if choice.backend != "reference":
            return leff_fused(x, parameters, norms, residual, settings._replace(backend=choice.backend), phase)
        functions = (self.act if self.first_act else nn.Identity(), self.act)
        return leff_reference(x, weights, biases, norm_modules, functions, grid_size, self.num_prefix_tokens, residual)

    def train(self, mode: bool = True) -> FusedLeFF:
        """Switch between training and inference, which also forgets the weights that were folded for inference."""
        forget(self.conv1.weight)
        return super().train(mode)

    def inference_parts(self) -> tuple[list[Tensor | None], tuple[float, ...], tuple[str, str]] | None:
        """What inference by the kernels takes: tensors in the operators' order, eps of the norms, activations.

        None where a norm takes batch statistics or the kernels do not serve the module.
        """
        norms = (self.bn1, self.bn2, self.bn3)
        parameters: list[Tensor | None] = []
        for convolution, norm in zip((self.conv1, self.conv2, self.conv3), norms, strict=True):
            state = norm._parameters, norm._buffers
            mean = state[1].get("running_mean")
            if norm.training or (mean is None and type(norm) is not nn.Identity):
                return None
            of_norm = (state[0].get("weight"), state[0].get("bias"), mean, state[1].get("running_var"))
            parameters += [convolution.weight, convolution.bias, *of_norm]
        if self._limit() is not None:
            return None
        eps = tuple([0.0 if type(norm) is nn.Identity else norm.eps for norm in norms])
        return parameters, eps, self._activations()

    def _activations(self) -> tuple[str, str]:
        activation = _activation_name(self.act)
        return (activation if self.first_act else "identity", activation)

    def _limit(self) -> str | None:
        if _activation_name(self.act) is None:
            return f"the kernels have no {type(self.act).__name__}, they have {', '.join(ACTIVATIONS)}"
        for norm in (self.bn1, self.bn2, self.bn3):
            if type(norm) not in _NORMS:
                return f"the kernels have no {type(norm).__name__}, they have BatchNorm2d and SyncBatchNorm"
        return kernel_size_limit(self.conv2.weight)


def _activation_name(activation: nn.Module) -> str | None:
    """What the kernels call an activation module; None for one that they do not have."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.Identity: "identity"}
    return names.get(type(activation))
