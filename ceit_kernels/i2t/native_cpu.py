"""The stem's inference on the CPU: oneDNN's convolution with the norm folded into it, and compiled max-pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.products import packed_convolution

__all__ = ["i2t_inference_cpu"]

torch.library.define("ceit::_i2t_pool", "(Tensor x, Tensor(a!) out) -> ()")

_IMAGES_AT_A_TIME = 4  # whose maps before pooling stay in cache; twice as many take almost twice the time an image
_STRIDE, _PADDING = 2, 3


def i2t_inference_cpu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The registered operator's first result, its arguments checked, B at least 1; channels-last in memory."""
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.rsqrt(variance.to(wide) + eps)
    scale = scale if gamma is None else scale * gamma.to(wide)
    bias = -mean.to(wide) * scale
    bias = (bias if beta is None else bias + beta.to(wide)).to(dtype)
    folded = (weight.to(wide) * scale[:, None, None, None]).to(dtype)
    x = x.to(dtype)
    sizes = [((size - 1) // 2 + 1 - 1) // 2 + 1 for size in x.shape[2:]]
    out = x.new_empty(x.shape[0], *sizes, weight.shape[0])
    convolve = packed_convolution(folded, bias, _STRIDE, _PADDING, (_IMAGES_AT_A_TIME, *x.shape[1:]))
    for start in range(0, x.shape[0], _IMAGES_AT_A_TIME):
        part = x[start : start + _IMAGES_AT_A_TIME].contiguous(memory_format=torch.channels_last)
        convolved = convolve(part).permute(0, 2, 3, 1).contiguous()
        torch.ops.ceit._i2t_pool(convolved, out[start : start + _IMAGES_AT_A_TIME])
    return out.permute(0, 3, 1, 2)
