"""The stem on the CPU: the schemas of ``csrc/cpu/i2t``, and the buffers and parameters that they take."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.sync_norm import gather_moments, sum_over_processes
from .arguments import Stem, conv_size

__all__ = ["i2t_backward_cpu", "i2t_forward_cpu", "stem_arguments"]

for _schema in (
    "_i2t_forward_cpu(Tensor image, Tensor weight, Tensor sign, Tensor? norm, Tensor(a!) out, Tensor(b!)? indices, "
    "Tensor(c!)? moments) -> ()",
    "_i2t_normalise_cpu(Tensor x, Tensor norm, Tensor(a!) out) -> ()",
    "_i2t_sums_cpu(Tensor gradient, Tensor x, Tensor mean, Tensor(a!) sums) -> ()",
    "_i2t_backward_cpu(Tensor gradient, Tensor indices, Tensor image, Tensor weight, Tensor coefficients, "
    "Tensor(a!) grad_weight, Tensor(b!) dots, Tensor(c!)? grad_convolution) -> ()",
):
    torch.library.define(f"ceit::{_schema.partition('(')[0]}", f"({_schema.partition('(')[2]}")

_TILE = 32  # output channels that prepacked weights have side by side
_PARTS = 64  # of a backward pass, each with sums of its own, so that they do not depend on the number of threads


def _prepack(weight: Tensor, dtype: torch.dtype, acc_dtype: torch.dtype) -> Tensor:
    """The weight (O, I, 7, 7), rounded to what is computed in: (tiles, I * 49, _TILE), filled up with zeros."""
    rows = weight.to(dtype).to(acc_dtype).flatten(1)
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % _TILE)).unflatten(0, (-1, _TILE)).transpose(1, 2).contiguous()


def _scale(variance: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(variance + eps)
    return rstd if gamma is None else rstd * gamma


def _norm(stem: Stem, acc_dtype: torch.dtype) -> Tensor:
    """Mean, scale and shift (3, O)."""
    gamma, beta, mean, variance = _vectors(stem, acc_dtype)
    shift = torch.zeros_like(mean) if beta is None else beta
    return torch.stack((mean, _scale(variance, gamma, stem.eps), shift))


def _vectors(stem: Stem, acc_dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(acc_dtype) for t in (stem.gamma, stem.beta, stem.mean, stem.variance)]


def stem_arguments(stem: Stem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the kernel takes beside the image: weight, sign of gamma, and the norm; none in training."""
    acc_dtype = torch.promote_types(dtype, torch.float32)
    ones = stem.weight.new_ones(stem.weight.shape[0], dtype=acc_dtype)
    sign = ones if stem.gamma is None else stem.gamma.to(acc_dtype).sign()
    norm = None if stem.mean is None else _norm(stem, acc_dtype)
    return _prepack(stem.weight, dtype, acc_dtype), sign, norm


def _merged(moments: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of rows (B, H, 2, O) of so many pixels each, from their means and centred sums of squares."""
    means, squares = moments.flatten(0, 1).unbind(1)
    # In float64, as plain PyTorch takes them: where the mean is near zero, sums of float32 lose its digits.
    means, squares = means.double(), squares.double()
    mean = means.mean(0)
    variance = squares.mean(0) / width + (means - mean).square_().mean(0)
    return mean.to(moments.dtype), variance.to(moments.dtype)


def _merged_over_processes(mean: Tensor, variance: Tensor, pixels: int, group: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of the pixels of all processes, from those of this one's."""
    moments, counts = gather_moments(torch.stack((mean, variance)), mean.new_tensor([pixels]), group)
    means, squares = moments.unbind(1)
    shares = (counts / counts.sum())[:, None]
    mean = means[0] + (shares * (means - means[0])).sum(0)
    return mean, squares.sum(0) / counts.sum() + (shares * (means - mean).square_()).sum(0)


def i2t_forward_cpu(
    x: Tensor, stem: Stem, need_indices: bool, dtype: torch.dtype, group: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The registered operator's results, its arguments checked, B at least 1."""
    training, acc_dtype = stem.mean is None, torch.promote_types(dtype, torch.float32)
    channels, conv_sizes = stem.weight.shape[0], [conv_size(size) for size in x.shape[2:]]
    size = x.shape[0], channels, *map(conv_size, conv_sizes)
    result = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    out = result.permute(0, 2, 3, 1)
    indices = x.new_empty(out.shape, dtype=torch.uint8) if training or need_indices else None
    # Backward takes it in training as it is before the norm: the result is its user's, who may write to it.
    pooled = torch.empty_like(out) if training and need_indices else None
    target = out if pooled is None else pooled
    moments = x.new_empty((x.shape[0], conv_sizes[0], 2, channels), dtype=acc_dtype) if training else None
    prepacked, sign, norm = stem_arguments(stem, dtype)
    torch.ops.ceit._i2t_forward_cpu(x.to(dtype), prepacked, sign, norm, target, indices, moments)
    mean = variance = None
    if training:
        mean, variance = _merged(moments, conv_sizes[1])
        if group is not None:
            pixels = x.shape[0] * conv_sizes[0] * conv_sizes[1]
            mean, variance = _merged_over_processes(mean, variance, pixels, group)
        torch.ops.ceit._i2t_normalise_cpu(target, _norm(stem._replace(mean=mean, variance=variance), acc_dtype), out)
    return result, None if indices is None else indices.permute(0, 3, 1, 2), mean, variance, pooled


def i2t_backward_cpu(
    grad_out: Tensor,
    x: Tensor,
    stem: Stem,
    indices: Tensor,
    pooled: Tensor | None,
    need_x: bool,
    dtype: torch.dtype,
    group: str | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x (None unless needed), the weight, gamma and beta; ``pooled`` is the forward's in training."""
    acc_dtype = torch.promote_types(dtype, torch.float32)
    weight, eps = stem.weight, stem.eps
    channels, conv_sizes = weight.shape[0], [conv_size(size) for size in x.shape[2:]]
    gamma, *_ = _vectors(stem, acc_dtype)
    mean, variance = (cast("Tensor", statistic).to(acc_dtype) for statistic in (stem.mean, stem.variance))
    grad_out, indices = (t.permute(0, 2, 3, 1).contiguous() for t in (grad_out.to(dtype), indices))
    scale, zeros = _scale(variance, gamma, eps), torch.zeros_like(mean)
    if pooled is not None:
        sums = x.new_empty((*grad_out.shape[:2], 2, channels), dtype=acc_dtype)
        torch.ops.ceit._i2t_sums_cpu(grad_out, pooled.contiguous(), mean, sums)
        grad_beta, centred = sums.flatten(0, 1).sum(0)
        totals = torch.cat((grad_beta, centred, mean.new_tensor([x.shape[0] * conv_sizes[0] * conv_sizes[1]])))
        if group is not None:
            totals = sum_over_processes(totals[None], group)[0]
        of_g, centred, pixels = totals.split((channels, channels, 1))
        coefficients = mean, scale, -scale * centred / ((variance + eps) * pixels), of_g / pixels
    else:
        grad_beta = grad_out.sum((0, 1, 2), dtype=acc_dtype)
        coefficients = mean, scale, zeros, zeros
    image = x.to(dtype)
    prepacked = _prepack(weight, dtype, acc_dtype)
    parts = min(_PARTS, x.shape[0] * conv_sizes[0])
    grad_weight, dots = (x.new_empty((parts, *size), dtype=acc_dtype) for size in (prepacked.shape, (channels,)))
    grad_convolution = x.new_empty((x.shape[0], *conv_sizes, channels), dtype=dtype) if need_x else None
    torch.ops.ceit._i2t_backward_cpu(
        grad_out, indices, image, prepacked, torch.stack(coefficients), grad_weight, dots, grad_convolution
    )
    grad_weight = grad_weight.sum(0).transpose(1, 2).contiguous().flatten(0, 1)[:channels].view(weight.shape)
    grad_gamma = dots.sum(0) * torch.rsqrt(variance + eps)
    grad_x = None
    if grad_convolution is not None:
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad_convolution.permute(0, 3, 1, 2), image, weight.to(dtype), None,
            [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [True, False, False],
        )  # fmt: skip
        grad_x = grad_x.to(x.dtype).contiguous()
    return grad_x, grad_weight, grad_gamma, grad_beta
