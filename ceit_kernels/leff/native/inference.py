"""LeFF's inference on the CPU, a few images at a time, so that their hidden tokens stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.products import linear, packed
from ..folding import FoldedWeights
from .stages import activation_index, bytes_in_cache, stages

__all__ = ["images_at_a_time", "leff_inference_native"]


def images_at_a_time(hidden_bytes: int) -> int:
    """Images whose hidden tokens, of so many bytes an image, are worked on together."""
    return max(1, torch.get_num_threads() * bytes_in_cache // max(hidden_bytes, 1))


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
    (batch, rows, channels), tokens = x.shape, grid_size[0] * grid_size[1]
    hidden, outputs = folded.weight1.shape[0], folded.weight3.shape[0]
    first, second = (activation_index(name) for name in activations)
    side = int(folded.taps.shape[0] ** 0.5)
    images = min(batch, images_at_a_time(tokens * hidden * dtype.itemsize))
    weight1, weight3 = (packed(w, images * tokens, constant=True) for w in (folded.weight1, folded.weight3))
    bias1, bias3 = folded.bias1.to(dtype), folded.bias3.to(dtype)
    tokens_in = x.to(dtype)
    prefix = x.to(out_dtype) if num_prefix_tokens else x
    residual = None if residual is None else residual.to(out_dtype)
    out = x.new_empty((batch, rows, outputs), dtype=out_dtype)
    h2 = x.new_empty((images, tokens, hidden), dtype=dtype)
    for start in range(0, batch, images):
        part = slice(start, min(start + images, batch))
        count = part.stop - start
        h1 = linear(tokens_in[part].view(-1, channels), weight1, bias1).view(count, rows, hidden)
        stages._leff_depthwise(h1, None, first, folded.taps, folded.bias2, second, side, *grid_size, h2[:count], None)
        z3 = linear(h2[:count].view(-1, hidden), weight3, bias3).view(count, tokens, outputs)
        part_residual = None if residual is None else residual[part]
        stages._leff_finish(z3, None, prefix[part], part_residual, tokens, out[part])
    return out
