"""The norm and gradient arrays of LeFF's norms, from what the stages summed up for each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import GRADIENT_ROWS, NORM_ROWS
from ..problem import Problem
from .stages import stages

__all__ = ["gradient_array", "norm_array"]


def norm_array(problem: Problem, layer: int, moments: Tensor | None, count: Tensor) -> Tensor | None:
    """The norm array (5, channels) of a layer; None where it has no norm.

    Args:
        problem: what the call computes.
        layer: 0, 1 or 2.
        moments: (B, 2, channels), mean and centred sum of squares of each image, where the norm takes batch statistics.
        count: (1,), receives the tokens that they were taken of.
    """
    if problem.norms[layer] == "none":
        return None
    parameters, wide = problem.layers[layer], problem.wide
    vectors = (parameters.running_mean, parameters.running_var, parameters.norm_weight, parameters.norm_bias)
    mean, variance, weight, bias = (None if vector is None else vector.to(wide) for vector in vectors)
    array = problem.empty(NORM_ROWS, parameters.weight.shape[0])
    if moments is None:
        stages._leff_norm_array(None, None, mean, variance, weight, bias, problem.eps[layer], array, None)
        return array
    counts = moments.new_full((moments.shape[0],), problem.tokens // moments.shape[0])
    if problem.group is not None:
        stages._leff_norm_array(moments, counts, None, None, None, None, 0.0, array, count)
        moments, counts = _gather(array[0], array[1] * count, count, problem.group)
    stages._leff_norm_array(moments, counts, None, None, weight, bias, problem.eps[layer], array, count)
    return array


def _gather(mean: Tensor, squares: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The moments (P, 2, channels) of P processes and of how many tokens each (P,) has taken them."""
    mine = torch.cat((mean, squares, count))
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(everyone, mine, group=group)
    everyone = everyone.view(-1, mine.numel())
    return everyone[:, :-1].reshape(-1, 2, mean.numel()), everyone[:, -1].contiguous()


def gradient_array(
    problem: Problem, layer: int, sums: Tensor, norm: Tensor | None, count: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The gradient array (4, channels) of a layer, None where it has no norm, and the gradients of its vectors.

    Args:
        problem: what the call computes.
        layer: 0, 1 or 2.
        sums: (B, 2, channels), of the gradient g of the norm's result and of g (z - mean), for each image.
        norm: the layer's norm array.
        count: (1,), the tokens that its statistics were taken of, in all processes.

    Returns:
        The array, and (3, channels), the gradients of the convolution's bias and the norm's weight and bias, in the
        type of the sums.
    """
    vectors = sums.new_empty(3, sums.shape[2])
    gradient = None if norm is None else sums.new_empty(GRADIENT_ROWS, sums.shape[2])
    batch_count = count if problem.norms[layer] == "batch" else None
    stages._leff_gradient_array(sums, norm, batch_count, vectors, gradient)
    if batch_count is not None and problem.group is not None:
        sums = sums.sum(0, keepdim=True)
        dist.all_reduce(sums, group=problem.group)
        stages._leff_gradient_array(sums, norm, batch_count, None, gradient)
    return gradient, vectors
