"""Host side of LeFF's Triton kernels: blocks, grids, buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv

from ..common.launch import launch, target_chip
from ..common.precision import precision_arguments
from ..common.tuning import Blocks, tuned_blocks
from .arguments import PARAMETER_NAMES, parameters_per_layer
from .blocks import inference_contract_blocks, inference_expand_blocks
from .kernels.inference import leff_contract_kernel, leff_expand_kernel

__all__ = ["leff_inference_triton"]


def leff_inference_triton(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    residual: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: tuple[str, str],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two launches, which read the parameters as they are. x and residual contiguous, B at least 1.

    Args:
        x: tokens (B, P + H * W, C).
        parameters: the tensors of ``arguments.PARAMETER_NAMES``; a layer without running statistics has no norm.
        eps: of each norm.
        residual: (B, P + H * W, O), added to the result, or None.
        grid_size: (H, W).
        num_prefix_tokens: P.
        activations: after the first and the second layer.
        dtype: what products take; pointwise weights of another dtype are cast first, a launch for each.
        out_dtype: of the result.

    Returns:
        Tokens (B, P + H * W, O).
    """
    batch, tokens, in_features = x.shape
    height, width = grid_size
    weight1, weight2, weight3 = parameters[::parameters_per_layer]
    hidden_features, out_features = weight1.shape[0], weight3.shape[0]
    image_tokens, kernel_size = batch * height * width, weight2.shape[-1]
    layer1, layer2, layer3 = _layer_arguments(parameters, dtype)
    precision = {**precision_arguments(dtype), "EXACT": dtype.itemsize > 2}
    hidden = torch.empty(image_tokens, hidden_features, dtype=dtype, device=x.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows2 = torch.empty(kernel_size**2 + 1, hidden_features, dtype=wide, device=x.device)

    def expand(blocks: Blocks, hidden: Tensor) -> None:
        sizes = blocks.sizes
        launch(
            leff_expand_kernel,
            ((cdiv(image_tokens, sizes["BM"]) + 1) * cdiv(hidden_features, sizes["BE"]),),
            {
                "p_x": x,
                **layer1,
                "p_h": hidden,
                **layer2,
                "p_rows2": rows2,
                "M": image_tokens,
                "HW": height * width,
                "P": num_prefix_tokens,
                "eps1": eps[0],
                "eps2": eps[1],
                "C": in_features,
                "E": hidden_features,
                "KERNEL": kernel_size,
                "ACTIVATION": activations[0],
                **sizes,
                **precision,
            },
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )

    def contract(blocks: Blocks, out: Tensor) -> None:
        sizes = blocks.sizes
        patches = batch * cdiv(height, 2) * cdiv(width, 2)
        prefix_blocks = cdiv(batch * num_prefix_tokens, 4 * sizes["BX"])
        launch(
            leff_contract_kernel,
            ((cdiv(patches, sizes["BX"]) + prefix_blocks) * cdiv(out_features, sizes["BO"] * sizes["NO"]),),
            {
                "p_h": hidden,
                "p_rows2": rows2,
                **layer3,
                "p_x": x,
                "p_residual": residual,
                "p_out": out,
                "B": batch,
                "H": height,
                "W": width,
                "P": num_prefix_tokens,
                "eps3": eps[2],
                "E": hidden_features,
                "O": out_features,
                "KERNEL": kernel_size,
                "ACTIVATION": activations[1],
                "HAS_RESIDUAL": residual is not None,
                **sizes,
                **precision,
            },
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )

    table = inference_expand_blocks(in_features, hidden_features, dtype)
    shape = {"tokens": image_tokens, "C": in_features, "E": hidden_features}
    expand(
        tuned_blocks("leff_expand", table, shape, x, dtype, lambda blocks: expand(blocks, torch.empty_like(hidden))),
        hidden,
    )
    out = torch.empty(batch, tokens, out_features, dtype=out_dtype, device=x.device)
    table = inference_contract_blocks(out_features, dtype, target_chip(x), residual is not None)
    shape = {"tokens": image_tokens, "E": hidden_features, "O": out_features, "kernel": kernel_size}
    shape["residual"] = residual is not None
    contract(
        tuned_blocks("leff_contract", table, shape, x, dtype, lambda blocks: contract(blocks, torch.empty_like(out))),
        out,
    )
    return out


def _layer_arguments(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[dict[str, Tensor | None]]:
    """Of each layer the arguments of a kernel that are its parameters: these themselves, but for one that is strided
    and a pointwise weight of another dtype than products take.
    """
    layers: list[dict[str, Tensor | None]] = [{}, {}, {}]
    for i, (name, parameter) in enumerate(zip(PARAMETER_NAMES, parameters, strict=True)):
        if parameter is not None:
            parameter = (parameter.to(dtype) if name in ("weight1", "weight3") else parameter).contiguous()
        layers[i // parameters_per_layer][f"p_{name}"] = parameter
    return layers
