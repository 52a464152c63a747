"""The running statistics of LeFF's norms in one launch."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ...common.launch import cdiv, launch
from ...common.plan import planned
from .kernels_reduce import leff_running_kernel

__all__ = ["update_running_statistics_triton"]

_BUFFERS = ("p_running_mean", "p_running_var", "p_batches")
_TILE = 256


@planned(tensors=1 + 3 + 3 * len(_BUFFERS))
def update_running_statistics_triton(count: Tensor, *tensors_and_momenta: Any) -> tuple[()]:
    """Average a batch into running statistics, as ``norms.update_running_statistics``.

    Args:
        count: (1,), of how many tokens the statistics were taken.
        tensors_and_momenta: the norm array of each layer; of each its running mean, running variance and number of
            batches; the momentum of each. All buffers of a layer that keeps none are None, and so is a number that is
            not counted. The tensors are contiguous and different ones.
    """
    *tensors, momentum1, momentum2, momentum3 = tensors_and_momenta
    norms, buffers = tensors[:3], tensors[3:]
    norms = [None if mean is None else norm for norm, mean in zip(norms, buffers[::3], strict=True)]
    hidden = next((norm.shape[1] for norm in norms[:2] if norm is not None), 1)
    outputs = 1 if norms[2] is None else norms[2].shape[1]
    known = {f"{name}{i // 3 + 1}": buffers[i] for i, name in enumerate(3 * _BUFFERS)}
    known |= {f"p_norm{i}": norm for i, norm in enumerate(norms, 1)}
    known |= {"momentum1": momentum1, "momentum2": momentum2, "momentum3": momentum3, "p_total": count}
    acc = tl.float64 if count.itemsize == 8 else tl.float32
    grid = (cdiv(max(hidden, outputs), _TILE), 3)
    launch(leff_running_kernel, grid, {**known, "E": hidden, "O": outputs, "TILE_E": _TILE, "ACC": acc}, num_warps=4)
    return ()
