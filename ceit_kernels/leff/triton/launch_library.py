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
from .kernels_library import ADDED_TILES, leff_depthwise_inference_kernel
from .kernels_norm import leff_norm_kernel
from .launch_common import Call, linear
from .tiles import depthwise_tiles, row_tiles

__all__ = ["leff_inference_library"]

_ROWS = 16  # of a tile of weights, or of what is added to a product


def leff_inference_library(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two GEMMs of PyTorch and the depthwise kernel between them, which also prepares the second: three launches.

    Where the result is not of the GEMMs' dtype, and for a norm in float16, in which a weight may have no room for its
    scale, a fourth applies the last norm, and adds prefix and residual.

    Arguments and result as of ``leff_inference_triton``.
    """
    return _infer(x, *parameters, residual, settings, out_dtype)


@planned(tensors=2 + len(PARAMETER_NAMES))
def _infer(x: Tensor, *rest: Any) -> Tensor:
    *parameters, residual, settings, out_dtype = rest
    call = Call(x, parameters, settings)
    layer1, _, layer3 = call.layers
    for i, (layer, eps) in enumerate(zip(call.layers, settings.eps, strict=True), 1):
        call.known |= {f"p_{name}{i}": tensor for name, tensor in layer._asdict().items()} | {f"eps{i}": eps}
    # Prefix tokens come along: leaving them out would copy the others.
    z1 = compute(linear, x, layer1.weight, layer1.bias, call.dtype)
    has_norm = layer3.running_mean is not None
    if call.dtype == out_dtype and not (has_norm and call.dtype == torch.float16):
        return _prepared(call, z1, residual, has_norm)
    norm3 = call.empty(NORM_ROWS, call.O) if has_norm else None
    h2 = _depthwise(call, z1, norm3=norm3)
    z3 = compute(linear, h2, layer3.weight, layer3.bias, call.dtype)
    out, tiles = call.empty(*x.shape[:2], call.O, dtype=out_dtype), row_tiles(call.O, 32)
    rows = tiles.sizes["TILE_M"]
    grid = cdiv(call.M, rows) + call.prefix_tiles(rows), cdiv(call.O, tiles.sizes["TILE_O"])
    call.launch(leff_norm_kernel, grid, tiles, p_z3=z3, p_norm3=norm3, p_residual=residual, p_out=out, p_x=x)
    return out


def _prepared(call: Call, z1: Tensor, residual: Tensor | None, has_norm: bool) -> Tensor:
    """The result from z1 where the last GEMM finds all that is done to its product in its operands."""
    layer3, adds = call.layers[2], residual is not None or call.settings.num_prefix_tokens > 0
    weight, bias, scaled, added = layer3.weight, layer3.bias, None, None
    if has_norm:
        weight = scaled = call.empty(call.O, call.E, dtype=call.dtype)
    if adds:
        added = call.empty(*call.x.shape[:2], call.O, dtype=call.dtype)
    elif has_norm:
        bias = added = call.empty(call.O, dtype=call.dtype)
    h2 = _depthwise(call, z1, scaled=scaled, added=added, residual=residual)
    if not adds or added is None:
        return compute(linear, h2, weight, bias, call.dtype)
    compute(_add_product, added, h2, weight)
    return added


def _depthwise(
    call: Call,
    z1: Tensor,
    *,
    norm3: Tensor | None = None,
    scaled: Tensor | None = None,
    added: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """h2, and of the last layer what there are tensors for."""
    settings, layer3 = call.settings, call.layers[2]
    tiles = depthwise_tiles(settings.width, call.E, call.kernel_size, call.dtype)
    columns = cdiv(settings.width, tiles.sizes["TILE_W"])
    channels, outputs = (cdiv(width, tiles.sizes["TILE_E"]) for width in (call.E, call.O))
    programs, rows2, rows = call.x.shape[0] * columns * channels, settings.height * settings.width, 0
    first, second = settings.activations
    arguments: dict[str, Any] = {"ACTIVATION1": first, "ACTIVATION2": second, "TILE_R": _ROWS, "p_weight3": None}
    if norm3 is not None:
        programs += outputs
    if scaled is not None:
        programs += cdiv(call.O, _ROWS) * channels
        arguments |= {"p_weight3": layer3.weight, "p_scaled": scaled}
    if added is not None:
        rows, rows2 = added.numel() // call.O, rows2 + settings.num_prefix_tokens
        programs += cdiv(rows, _ROWS * ADDED_TILES.value) * outputs
        arguments |= {"p_added": added, "p_x": call.x, "p_residual": residual}
    h2 = call.empty(call.x.shape[0], rows2, call.E, dtype=call.dtype)
    arguments |= {"p_z1": z1, "p_h2": h2, "p_norm3": norm3, "ROWS": rows}
    call.launch(leff_depthwise_inference_kernel, (programs,), tiles, **arguments)
    return h2


def _add_product(out: Tensor, h2: Tensor, weight: Tensor) -> None:
    """Add a pointwise layer's product to a result of as many tokens."""
    rows = out.flatten(0, 1)
    torch.addmm(rows, h2.flatten(0, 1), weight.flatten(1).t().to(out.dtype), out=rows)
