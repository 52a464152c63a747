"""The image-to-tokens stem in plain PyTorch: what the fused operator is checked against."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["image2tokens_reference"]


def image2tokens_reference(
    x: Tensor,  # (B, I, H, W)
    weight: Tensor,  # (O, I, k, k)
    norm: Callable[[Tensor], Tensor],
    stride: int,
) -> Tensor:
    """Convolution, norm and a 3x3 maximum pool of stride 2 (CeiT, section 3.2).

    Returns:
        (B, O, H', W'), the map that patches are cut from; H' is about ``H / (2 * stride)``.
    """
    image = norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))
    return F.max_pool2d(image, kernel_size=3, stride=2, padding=1)
