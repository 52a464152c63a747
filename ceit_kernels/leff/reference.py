"""The locally-enhanced feed-forward block in plain PyTorch: what the fused operator is checked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["leff_reference"]

Layer = Callable[[Tensor], Tensor]


def leff_reference(
    x: Tensor,  # (B, P + H*W, C)
    weights: Sequence[Tensor],  # (E, C, 1, 1) or (E, C), (E, 1, k, k), (O, E, 1, 1) or (O, E)
    biases: Sequence[Tensor | None],  # (E,), (E,), (O,)
    norms: Sequence[Layer],  # after each convolution, on (B, E, H, W), (B, E, H, W), (B, O, H, W)
    activations: Sequence[Layer],  # after the first and the second convolution
    grid_size: tuple[int, int],  # (H, W)
    num_prefix_tokens: int,  # P, tokens that pass through
    residual: Tensor | None = None,  # (B, P + H*W, O)
) -> Tensor:
    """Pointwise, depthwise and pointwise convolution over the image that the tokens make (CeiT, section 3.3).

    The residual is added to every token, prefix tokens included.

    Returns:
        (B, P + H*W, O).
    """
    prefix, tokens = x.split([num_prefix_tokens, grid_size[0] * grid_size[1]], dim=1)
    # No transposed views: of one image PyTorch takes them for another memory format, and norms' gradients are wrong.
    image = tokens.reshape(x.shape[0], *grid_size, x.shape[2]).permute(0, 3, 1, 2)  # (B, C, H, W)
    expand, contract = (weight.reshape(*weight.shape[:2], 1, 1) for weight in weights[::2])
    image = activations[0](norms[0](F.conv2d(image, expand, biases[0])))
    padding, groups = weights[1].shape[-1] // 2, weights[1].shape[0]
    image = activations[1](norms[1](F.conv2d(image, weights[1], biases[1], padding=padding, groups=groups)))
    image = norms[2](F.conv2d(image, contract, biases[2]))
    tokens = image.permute(0, 2, 3, 1).flatten(1, 2)
    out = torch.cat((prefix, tokens), dim=1) if num_prefix_tokens else tokens
    return out if residual is None else out + residual
