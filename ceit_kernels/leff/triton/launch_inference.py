"""LeFF's inference in two launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.launch import cdiv
from ...common.plan import planned
from ...common.tuning import Tiles
from ..arguments import PARAMETER_NAMES, SHAPED, Settings
from .kernels_inference import leff_contract_kernel, leff_expand_kernel
from .launch_common import Call
from .tiles import inference_contract_tiles, inference_expand_tiles

__all__ = ["leff_inference_triton"]


def leff_inference_triton(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two launches, which read the parameters as they are, but for pointwise weights of another dtype than the GEMMs'.

    Args:
        x: tokens (B, P + H * W, C), B at least 1.
        parameters: the tensors of ``arguments.PARAMETER_NAMES``; a layer without running statistics has no norm.
        residual: (B, P + H * W, O), added to the result; nothing if None.
        settings: of the call.
        out_dtype: of the result.

    Returns:
        Tokens (B, P + H * W, O).
    """
    return _run(x, *parameters, residual, settings, out_dtype)


@planned(tensors=2 + len(PARAMETER_NAMES), shaped=SHAPED)
def _run(x: Tensor, *rest: Any) -> Tensor:
    *parameters, residual, settings, out_dtype = rest
    call = Call(x, parameters, settings)
    layer1, layer2, layer3 = call.layers
    rows2 = call.empty(call.kernel_size**2 + 1, call.E)

    known = {f"p_{name}1": tensor for name, tensor in layer1._replace(weight=call.weight(0))._asdict().items()}
    known |= {f"p_{name}2": tensor for name, tensor in layer2._asdict().items()}
    known |= {f"p_{name}3": tensor for name, tensor in layer3._replace(weight=call.weight(2))._asdict().items()}
    known |= {f"eps{i}": eps for i, eps in enumerate(settings.eps, 1)}
    call.known |= {**known, "p_rows2": rows2, "p_x": x, "p_residual": residual}

    def expand(tiles: Tiles) -> Tensor:
        hidden = call.empty(call.M, call.E, dtype=call.dtype)
        grid = ((cdiv(call.M, tiles.sizes["TILE_M"]) + 1) * cdiv(call.E, tiles.sizes["TILE_E"]),)
        call.launch(leff_expand_kernel, grid, tiles, p_h=hidden, ACTIVATION=settings.activations[0])
        return hidden

    def contract(tiles: Tiles) -> Tensor:
        out = call.empty(*x.shape[:2], call.O, dtype=out_dtype)
        rows = tiles.sizes["TILE_P"]
        patches = x.shape[0] * cdiv(settings.height, 2) * cdiv(settings.width, 2)
        columns = cdiv(call.O, tiles.sizes["TILE_O"] * tiles.sizes["NUM_O"])
        grid = ((cdiv(patches, rows) + call.prefix_tiles(4 * rows)) * columns,)
        call.launch(leff_contract_kernel, grid, tiles, p_h=hidden, p_out=out, ACTIVATION=settings.activations[1])
        return out

    table = inference_expand_tiles(call.C, call.E, call.dtype)
    hidden = call.tuned(leff_expand_kernel, table, {"C": call.C, "E": call.E}, expand)
    table = inference_contract_tiles(call.O, call.dtype, call.chip, residual is not None)
    shape = {"E": call.E, "O": call.O, "kernel": call.kernel_size, "residual": residual is not None}
    return call.tuned(leff_contract_kernel, table, shape, contract)
