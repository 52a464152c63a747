"""The running statistics of LeFF's norms in one launch."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ...common.launch import cdiv, launch
from ...common.plan import planned
from .kernels_reduce import leff_running_kernel

__all__ = ["update_running_statistics_triton"]

_LAYERS = ("p_norm", "p_running_mean", "p_running_var", "p_batches")
_TILE = 256


@planned(tensors=1 + 3 * len(_LAYERS))
def update_running_statistics_triton(count: Tensor, *tensors_and_momenta: Any) -> tuple[()]:
    """Average a batch into running statistics, as ``norms.update_running_statistics``.

    Args:
        count: (1,), of how many tokens the statistics were taken.
        tensors_and_momenta: of each layer its norm array, running mean, running variance and number of batches; then
            the momentum of each. All of a layer that keeps none are None, and so is a number that is not counted. The
            tensors are contiguous and different ones.
    """
    *tensors, momentum1, momentum2, momentum3 = tensors_and_momenta
    norms = tensors[:: len(_LAYERS)]
    hidden = next((norm.shape[1] for norm in norms[:2] if norm is not None), 1)
    outputs = 1 if norms[2] is None else norms[2].shape[1]
    known = {f"{name}{i // len(_LAYERS) + 1}": tensors[i] for i, name in enumerate(3 * _LAYERS)}
    known |= {"momentum1": momentum1, "momentum2": momentum2, "momentum3": momentum3, "p_total": count}
    acc = tl.float64 if count.itemsize == 8 else tl.float32
    grid = (cdiv(max(hidden, outputs), _TILE), 3)
    launch(leff_running_kernel, grid, {**known, "E": hidden, "O": outputs, "TILE_E": _TILE, "ACC": acc}, num_warps=4)
    return ()
