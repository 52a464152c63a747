"""LeFF's training on the CPU, forward and backward, by one compiled call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import NORM_MODES, parameters_per_layer
from ..problem import Forward, Needs, Problem
from . import processes  # noqa: F401  what compiled code calls
from .stages import activation_index, stages

__all__ = ["leff_backward_native", "leff_forward_native"]


def _parameters(problem: Problem) -> list[Tensor | None]:
    """Those of the pointwise convolutions in the type of products, all others in that of sums."""
    dtype, wide = problem.dtype, problem.wide
    if all(parameter is None or parameter.dtype is wide for parameter in problem.parameters) and dtype is wide:
        return list(problem.parameters)
    of_products = {0, 1, 2 * parameters_per_layer, 2 * parameters_per_layer + 1}
    return [
        None if parameter is None else parameter.to(dtype if i in of_products else wide)
        for i, parameter in enumerate(problem.parameters)
    ]


def _settings(problem: Problem) -> tuple[list[int], list[int], str]:
    """Modes of the norms, sizes, and the name of the processes that share statistics."""
    sizes = [*map(activation_index, problem.activations), *problem.grid_size]
    return [NORM_MODES.index(norm) for norm in problem.norms], sizes, problem.group.group_name if problem.group else ""


def leff_forward_native(problem: Problem, residual: Tensor | None, out_dtype: torch.dtype) -> Forward:
    """The registered operator's results. x and residual contiguous, B at least 1."""
    x = problem.x
    out = problem.empty(*x.shape[:2], problem.out_features, dtype=out_dtype)
    prefix = x.to(out_dtype) if problem.num_prefix_tokens else x
    residual = None if residual is None else residual.to(out_dtype)
    modes, sizes, group = _settings(problem)
    saved = stages._leff_train(
        x.to(problem.dtype), _parameters(problem), residual, prefix, problem.eps, modes, sizes, group, out
    )
    return Forward(out, *saved)


def leff_backward_native(
    problem: Problem, saved: Forward, dout: Tensor, need_x: bool, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x, and those of weight, bias, norm weight and norm bias of each layer; None where not wanted.

    Args:
        problem: of the forward pass.
        saved: what it returned.
        dout: gradient of the result, contiguous.
        need_x: whether the gradient of x is wanted.
        needs: the gradients that are wanted of each layer.
    """
    x, modes_sizes_group = problem.x, _settings(problem)
    wanted = [need for layer in needs for need in layer]
    dx, *gradients = stages._leff_train_backward(
        dout.to(problem.dtype), x.to(problem.dtype), _parameters(problem), saved[1:], *modes_sizes_group, need_x,
        sum(1 << i for i, need in enumerate(wanted) if need),
    )  # fmt: skip
    likes = [like for layer in problem.layers for like in layer[:4]]
    found = [g.to(like.dtype) if need else None for g, like, need in zip(gradients, likes, wanted, strict=True)]
    if not need_x:
        return None, found
    dx = dx.to(x.dtype)
    if problem.num_prefix_tokens:
        dx[:, : problem.num_prefix_tokens] = dout[:, : problem.num_prefix_tokens]
    return dx, found
