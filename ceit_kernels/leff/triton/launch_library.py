"""LeFF's inference by a library's GEMMs, and one kernel for all that stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.launch import cdiv
from ...common.plan import compute, planned
from ..arguments import PARAMETER_NAMES, Settings
from . import NORM_ROWS
from .kernels_library import leff_depthwise_inference_kernel
from .kernels_norm import leff_norm_kernel
from .launch_common import Call, linear
from .tiles import depthwise_tiles, row_tiles

__all__ = ["leff_inference_library"]


def leff_inference_library(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two GEMMs of PyTorch and the depthwise kernel between them; then what the last norm, prefix and residual need.

    Arguments and result as of ``leff_inference_triton``.
    """
    return _infer(x, *parameters, residual, settings, out_dtype)


@planned(tensors=2 + len(PARAMETER_NAMES))
def _infer(x: Tensor, *rest: Any) -> Tensor:
    *parameters, residual, settings, out_dtype = rest
    call = Call(x, parameters, settings)
    layer1, _, layer3 = call.layers
    norm3 = None if layer3.running_mean is None else call.empty(NORM_ROWS, call.O)
    for i, (layer, eps) in enumerate(zip(call.layers, settings.eps, strict=True), 1):
        call.known |= {f"p_{name}{i}": tensor for name, tensor in layer._asdict().items()} | {f"eps{i}": eps}

    # Prefix tokens come along: leaving them out would copy the others.
    z1 = compute(linear, x, layer1.weight, layer1.bias, call.dtype)
    h2 = call.empty(call.x.shape[0], settings.height * settings.width, call.E, dtype=call.dtype)
    tiles = depthwise_tiles(settings.width, call.E, call.kernel_size, call.dtype)
    columns, channels = cdiv(settings.width, tiles.sizes["TILE_W"]), cdiv(call.E, tiles.sizes["TILE_E"])
    vectors = 0 if norm3 is None else cdiv(call.O, tiles.sizes["TILE_E"])
    first, second = settings.activations
    arguments = {"p_z1": z1, "p_h2": h2, "p_norm3": norm3, "ACTIVATION1": first, "ACTIVATION2": second}
    call.launch(leff_depthwise_inference_kernel, (x.shape[0] * columns * channels + vectors,), tiles, **arguments)
    z3 = compute(linear, h2, layer3.weight, layer3.bias, call.dtype)
    if norm3 is None and residual is None and not settings.num_prefix_tokens and call.dtype == out_dtype:
        return z3
    out, tiles = call.empty(*x.shape[:2], call.O, dtype=out_dtype), row_tiles(call.O)
    rows = tiles.sizes["TILE_M"]
    grid = cdiv(call.M, rows) + call.prefix_tiles(rows), cdiv(call.O, tiles.sizes["TILE_O"])
    call.launch(leff_norm_kernel, grid, tiles, p_z3=z3, p_norm3=norm3, p_residual=residual, p_out=out, p_x=x)
    return out
