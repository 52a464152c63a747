"""LeFF's inference on the CPU, a few images at a time, so that their hidden tokens stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.products import has_panels, in_panels, packed
from ..folding import FoldedWeights
from .stages import activation_index, images_at_a_time, stages

__all__ = ["leff_inference_native"]

# Of hidden tokens for each thread: both products and the stage between them stay in the second level of cache.
bytes_in_cache = 512 << 10


def leff_inference_native(
    x: Tensor,
    folded: FoldedWeights,
    residual: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: tuple[str, str],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """The registered operator's result, its arguments checked; x and residual contiguous, B at least 1."""
    tokens, hidden = grid_size[0] * grid_size[1], folded.weight1.shape[0]
    first, second = (activation_index(name) for name in activations)
    images = min(x.shape[0], images_at_a_time(tokens * hidden * dtype.itemsize, bytes_in_cache))
    pack = in_panels if out_dtype == dtype and has_panels(dtype, x.shape[2], hidden) else packed
    weight1, weight3 = (pack(w, images * tokens, constant=True) for w in (folded.weight1, folded.weight3))
    out = x.new_empty((*x.shape[:2], folded.weight3.shape[0]), dtype=out_dtype)
    stages._leff_infer(
        x.to(dtype),
        x.to(out_dtype) if num_prefix_tokens else x,
        weight1,
        folded.bias1.to(dtype),
        folded.taps,
        folded.bias2,
        weight3,
        folded.bias3.to(dtype),
        None if residual is None else residual.to(out_dtype),
        first,
        second,
        *grid_size,
        images,
        out,
    )
    return out
