"""Host side of LeFF's Triton kernels: blocks, grids, buffers."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from ..common.launch import launch, target_chip
from ..common.precision import precision_arguments
from ..common.tuning import Blocks, tuned_blocks
from .blocks import inference_contract_blocks, inference_expand_blocks
from .folding import FoldedWeights
from .kernels.inference import leff_contract_kernel, leff_expand_kernel

__all__ = ["leff_inference_triton"]


def leff_inference_triton(
    x: Tensor,
    folded: FoldedWeights,
    residual: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: tuple[str, str],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two launches. x and residual contiguous, B at least 1; ``dtype`` is what products take."""
    batch, tokens, in_features = x.shape
    height, width = grid_size
    hidden_features, out_features = folded.bias1.shape[0], folded.bias3.shape[0]
    image_tokens, kernel_size = batch * height * width, round(folded.taps.shape[0] ** 0.5)
    precision = {**precision_arguments(dtype), "EXACT": dtype.itemsize > 2}
    hidden = torch.empty(image_tokens, hidden_features, dtype=dtype, device=x.device)

    def expand(blocks: Blocks, hidden: Tensor) -> None:
        sizes = blocks.sizes
        launch(
            leff_expand_kernel,
            (cdiv(image_tokens, sizes["BM"]) * cdiv(hidden_features, sizes["BE"]),),
            {
                "p_x": x,
                "p_weight": folded.weight1,
                "p_bias": folded.bias1,
                "p_h": hidden,
                "M": image_tokens,
                "HW": height * width,
                "P": num_prefix_tokens,
                "C": in_features,
                "E": hidden_features,
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
                "p_taps": folded.taps,
                "p_bias2": folded.bias2,
                "p_weight": folded.weight3,
                "p_bias3": folded.bias3,
                "p_x": x,
                "p_residual": residual,
                "p_out": out,
                "B": batch,
                "H": height,
                "W": width,
                "P": num_prefix_tokens,
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
