"""The norm and gradient arrays of LeFF's norms, from what the stages summed up for each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import NORM_ROWS
from ..problem import Problem

__all__ = ["gradient_array", "norm_array"]


def norm_array(problem: Problem, layer: int, moments: Tensor | None, count: Tensor) -> Tensor | None:
    """The norm array (5, channels) of a layer; None where it has no norm.

    Args:
        problem: what the call computes.
        layer: 0, 1 or 2.
        moments: (B, 2, channels), mean and centred sum of squares of each image, where the norm takes batch statistics.
        count: (1,), receives the tokens that they were taken of.
    """
    mode, parameters = problem.norms[layer], problem.layers[layer]
    if mode == "none":
        return None
    if moments is None:
        mean, variance = (tensor.to(problem.wide) for tensor in (parameters.running_mean, parameters.running_var))
    else:
        counts = moments.new_full((problem.x.shape[0],), problem.tokens / problem.x.shape[0])
        mean, squares, total = _merge(moments[:, 0], moments[:, 1], counts)
        if problem.group is not None:
            mean, squares, total = _merge(*_gather(mean, squares, total, problem.group))
        variance = squares / total
        count.copy_(total)
    rstd = torch.rsqrt(variance + problem.eps[layer])
    weight, bias = parameters.norm_weight, parameters.norm_bias
    scale = rstd if weight is None else rstd * weight.to(problem.wide)
    shift = torch.zeros_like(mean) if bias is None else bias.to(problem.wide)
    return torch.stack((mean, variance, rstd, scale, shift)).view(NORM_ROWS, -1)


def _merge(means: Tensor, squares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, centred sum of squares and count of parts (T, channels) together."""
    total, weights = counts.sum(), counts[:, None]
    # About the mean of the first part, so that a mean far from zero costs no digits.
    mean = means[0] + ((means - means[0]) * weights).sum(0) / total
    return mean, squares.sum(0) + ((means - mean).square_() * weights).sum(0), total.view(1)


def _gather(mean: Tensor, squares: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of every process, one below another."""
    mine = torch.cat((mean, squares, count))
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(everyone, mine, group=group)
    everyone = everyone.view(-1, mine.numel())
    return everyone[:, : mean.numel()], everyone[:, mean.numel() : -1], everyone[:, -1]


def gradient_array(
    problem: Problem, layer: int, sums: Tensor, norm: Tensor | None, count: Tensor
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient array (4, channels) of a layer, None where it has no norm, and the gradients of its vectors.

    Args:
        problem: what the call computes.
        layer: 0, 1 or 2.
        sums: (B, 2, channels), of the gradient g of the norm's result and of g (z - mean), for each image.
        norm: the layer's norm array.
        count: (1,), the tokens that its statistics were taken of, in all processes.

    Returns:
        The array, and the gradients of the convolution's bias and the norm's weight and bias, in the type of the sums.
    """
    sums = sums.sum(0)
    if norm is None:
        return None, [sums[0], sums[1], sums[0]]
    mean, _, rstd, scale, _ = norm.unbind()
    vectors = [scale * sums[0], sums[1] * rstd, sums[0]]
    if problem.norms[layer] == "frozen":
        zeros = torch.zeros_like(mean)
        return torch.stack((mean, scale, zeros, zeros)), vectors
    vectors[0] = torch.zeros_like(mean)  # the norm takes the bias away
    if problem.group is not None:
        sums = sums.clone()
        dist.all_reduce(sums, group=problem.group)
    shares = sums / count
    return torch.stack((mean, scale, -scale * rstd.square() * shares[1], -scale * shares[0])), vectors
