"""LeFF's inference on the CPU, image by image, so that hidden tokens stay in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import parameters_per_layer
from .stages import activation_index, stages

__all__ = ["in_compute_dtype", "leff_inference_native", "leff_sizes"]


def leff_sizes(
    parameters: Sequence[Tensor | None], activations: Sequence[str], grid_size: tuple[int, int]
) -> list[int]:
    """What ``ceit::_leff_infer`` takes beside tensors, of ``parameters`` as the operators have them."""
    weight1, weight2, weight3 = parameters[::parameters_per_layer]
    sizes = [weight1.shape[1], weight1.shape[0], weight3.shape[0], weight2.shape[-1]]
    return [*sizes, *map(activation_index, activations), *grid_size]


def in_compute_dtype(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The parameters with weights in the dtype of products; vectors are read in any."""
    return [tensor.to(dtype) if i % parameters_per_layer == 0 else tensor for i, tensor in enumerate(parameters)]


def leff_inference_native(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    residual: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: Sequence[str],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """The registered operator's result, its arguments checked; x and residual contiguous, B at least 1."""
    parameters = in_compute_dtype(parameters, dtype)
    sizes = leff_sizes(parameters, activations, grid_size)
    out = x.new_empty((*x.shape[:2], sizes[2]), dtype=dtype)
    alike = out_dtype == dtype
    added = residual.to(dtype) if alike and residual is not None else None
    stages._leff_infer(x.to(dtype), parameters, None, added, eps, sizes, out)
    if alike:
        return out
    # Under autocast prefix tokens and residual are not rounded to the dtype of products.
    out = out.to(out_dtype)
    out[:, :num_prefix_tokens] = x[:, :num_prefix_tokens]
    return out if residual is None else out.add_(residual)
