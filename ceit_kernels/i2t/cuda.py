"""The compiled stem's schema and buffers. ``csrc/cuda/i2t`` implements these two operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launch import is_recording
from .arguments import Running, Stem, conv_size, pooled_size

__all__ = ["OUT_CHANNELS", "i2t_backward_cuda", "i2t_forward_cuda"]

OUT_CHANNELS = (32, 64, 96)

torch.library.define(
    "ceit::_i2t_forward",
    "(Tensor image, Tensor weight, Tensor? gamma, Tensor? beta, Tensor(a!) mean, Tensor(b!) variance, "
    "Tensor(c!) prepacked, Tensor(d!)? moments, Tensor(e!) out, Tensor(f!)? indices, Tensor(g!)? running_mean, "
    "Tensor(h!)? running_variance, Tensor(i!)? batches, float eps, bool training, bool tensor_cores, "
    "int rows_per_block, float momentum, float unbiased) -> ()",
)
torch.library.define(
    "ceit::_i2t_backward",
    "(Tensor gradient, Tensor indices, Tensor image, Tensor weight, Tensor? gamma, Tensor mean, Tensor variance, "
    "Tensor(a!) prepacked, Tensor(b!) sums, Tensor(c!) grad_weight, Tensor(d!) grad_gamma, Tensor(e!) grad_beta, "
    "Tensor(f!)? grad_image, float eps, bool training, bool tensor_cores, int blocks) -> ()",
)

_PACKED_PER_CHANNEL = 7 * 8 * 4
_POOLED_COLUMNS_PER_BLOCK, _WARPS_ACROSS, _TILE_ROWS = 14, 2, 4
_TILE = (14, 16)  # of the convolution, in backward
_CHANNELS_PER_BLOCK = 32  # in backward
_NONE = Running(None, None, None, 0.0, 1.0)
_MULTIPROCESSORS_ON_HOST, _MULTIPROCESSORS_RECORDED = 4, 132  # the latter an H100's


def _multiprocessors(x: Tensor) -> int:
    if is_recording():
        return _MULTIPROCESSORS_RECORDED
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _MULTIPROCESSORS_ON_HOST


def _parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_parameters(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels read parameters and statistics in float32 (float64 if they compute in it)."""
    parameter = _parameter_dtype(dtype)
    return [None if t is None else t.to(parameter, memory_format=torch.contiguous_format).contiguous() for t in tensors]


def _image_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The image in any layout, in a dtype that the kernels read: theirs, or float32 which they round as they load."""
    return x if x.dtype in (dtype, torch.float32) and _parameter_dtype(dtype) == torch.float32 else x.to(dtype)


def _tensor_cores(dtype: torch.dtype) -> bool:
    """float32 follows the switch of cuDNN's convolutions, which do the same in plain PyTorch."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"


def _rows_per_block(x: Tensor, height: int, width: int) -> int:
    """Pooled rows of a thread block: all, so that none is computed twice, unless multiprocessors would be idle."""
    blocks = x.shape[0] * -(-width // _POOLED_COLUMNS_PER_BLOCK)
    segments = max(1, -(-4 * _multiprocessors(x) // blocks))
    tiles = -(-height // _TILE_ROWS)
    return -(-tiles // min(segments, tiles)) * _TILE_ROWS


def i2t_forward_cuda(
    x: Tensor, stem: Stem, need_indices: bool, dtype: torch.dtype, running: Running = _NONE
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
    """The registered operator's results, its arguments checked; averages running statistics in training."""
    training, parameter = stem.mean is None, _parameter_dtype(dtype)
    channels, height, width = stem.weight.shape[0], pooled_size(x.shape[2]), pooled_size(x.shape[3])
    weight, gamma, beta, mean, variance = _as_parameters(dtype, *stem[:5])
    result = torch.empty(
        (x.shape[0], channels, height, width), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
    out = result.permute(0, 2, 3, 1)
    indices = moments = None
    if training or need_indices:
        indices = torch.empty(out.shape, dtype=torch.uint8, device=x.device)
    rows = _rows_per_block(x, height, width)
    if training:
        mean, variance = (torch.empty(channels, dtype=parameter, device=x.device) for _ in range(2))
        blocks = x.shape[0] * -(-width // _POOLED_COLUMNS_PER_BLOCK) * -(-height // rows)
        moments = torch.empty(_WARPS_ACROSS * blocks * (1 + 2 * channels), dtype=parameter, device=x.device)
    prepacked = torch.empty(channels * _PACKED_PER_CHANNEL, dtype=dtype, device=x.device)
    torch.ops.ceit._i2t_forward(
        _image_for(x, dtype), weight, gamma, beta, mean, variance, prepacked, moments, out, indices, *running[:3],
        stem.eps, training, _tensor_cores(dtype), rows, *running[3:],
    )  # fmt: skip
    indices = None if indices is None else indices.permute(0, 3, 1, 2)
    return (result, indices, mean, variance, None) if training else (result, indices, None, None, None)


def i2t_backward_cuda(
    grad_out: Tensor, x: Tensor, stem: Stem, indices: Tensor, training: bool, need_input: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x (None unless needed), the weight, gamma and beta; the last three in the kernels' dtype."""
    parameter = _parameter_dtype(dtype)
    weight, gamma, _, mean, variance = _as_parameters(dtype, *stem[:5])
    channels, fan_in = stem.weight.shape[0], stem.weight.shape[1] * 49
    tiles = x.shape[0] * -(-conv_size(x.shape[2]) // _TILE[0]) * -(-conv_size(x.shape[3]) // _TILE[1])
    blocks = min(tiles, max(1, _multiprocessors(x) * _CHANNELS_PER_BLOCK // channels))
    of_patches = fan_in * (channels // 16)  # at most: a block of float32 has as few channels
    sums = torch.empty(blocks * (2 * fan_in * channels + of_patches + channels), dtype=parameter, device=x.device)
    prepacked = torch.empty(channels * _PACKED_PER_CHANNEL, dtype=dtype, device=x.device)
    image = _image_for(x, dtype)
    grad_x = torch.empty(image.shape, dtype=image.dtype, device=x.device) if need_input else None
    grad_weight = torch.empty(stem.weight.shape, dtype=parameter, device=x.device)
    grad_gamma, grad_beta = (torch.empty(channels, dtype=parameter, device=x.device) for _ in range(2))
    torch.ops.ceit._i2t_backward(
        grad_out.permute(0, 2, 3, 1).to(dtype).contiguous(), indices.permute(0, 2, 3, 1).contiguous(),
        image, weight, gamma, mean, variance, prepacked, sums, grad_weight, grad_gamma, grad_beta, grad_x,
        stem.eps, training, _tensor_cores(dtype), blocks,
    )  # fmt: skip
    return (None if grad_x is None else grad_x.to(x.dtype)), grad_weight, grad_gamma, grad_beta
