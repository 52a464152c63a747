"""``ceit::leff_inference``: schema, checks, autocast. It has no gradient yet: what needs one runs by the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.registration import refuse_gradient, register_autocast
from .folding import fold, parameters_per_layer
from .grid import token_grid

__all__ = ["ACTIVATIONS", "KERNEL_SIZES"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "hardswish", "identity")
KERNEL_SIZES = (3, 5, 7)

torch.library.define(
    "ceit::leff_inference",
    "(Tensor x, Tensor?[] parameters, Tensor? residual, float[] eps, int height, int width, int num_prefix_tokens, "
    "str activation1, str activation2, ScalarType? compute_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    eps: Sequence[float],
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: tuple[str, str],
    compute_dtype: torch.dtype | None,
) -> int:
    """Check the arguments; returns the channels of the result."""
    if len(parameters) != 3 * parameters_per_layer or len(eps) != 3:
        raise ValueError(
            f"parameters: expected 6 and an eps for each of 3 layers, got {len(parameters)} and {len(eps)}"
        )
    weight1, weight2, weight3 = parameters[::parameters_per_layer]
    hidden, out_features, kernel_size = weight1.shape[0], weight3.shape[0], weight2.shape[-1]
    check_shape("x", x, "B", "N", weight1.shape[1])
    check_floating("x", x)
    check_shape("parameters[0]", weight1, hidden, x.shape[2], 1, 1)
    check_shape("parameters[6]", weight2, hidden, 1, kernel_size, kernel_size)
    check_shape("parameters[12]", weight3, out_features, hidden, 1, 1)
    for i, parameter in enumerate(parameters):
        if parameter is None:
            continue
        name = f"parameters[{i}]"
        if i % parameters_per_layer:
            check_shape(name, parameter, parameters[i // parameters_per_layer * parameters_per_layer].shape[0])
        check_device(name, parameter, x, "x")
        if compute_dtype is None and i % parameters_per_layer < 2:
            check_dtype(name, parameter, x.dtype, "x")
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(f"parameters[6]: expected a kernel of side {KERNEL_SIZES}, got {kernel_size}")
    for name in activations:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {name!r}")
    token_grid(x.shape[1], num_prefix_tokens, grid_size)
    if num_prefix_tokens and out_features != x.shape[2]:
        raise ValueError(f"parameters[12]: expected {x.shape[2]} outputs, which prefix tokens keep, got {out_features}")
    if residual is not None:
        check_shape("residual", residual, x.shape[0], x.shape[1], out_features)
        check_device("residual", residual, x, "x")
    return out_features


def _out_dtype(x: Tensor, num_prefix_tokens: int, compute_dtype: torch.dtype | None) -> torch.dtype:
    """As concatenating the prefix tokens with the convolutions' result has it."""
    dtype = compute_dtype or x.dtype
    return torch.promote_types(x.dtype, dtype) if num_prefix_tokens else dtype


@torch.library.impl("ceit::leff_inference", "default")
def _forward(
    x, parameters, residual, eps, height, width, num_prefix_tokens, activation1, activation2, compute_dtype, backend
):
    activations = (activation1, activation2)
    out_features = _check(x, parameters, residual, eps, (height, width), num_prefix_tokens, activations, compute_dtype)
    dtype, out_dtype = compute_dtype or x.dtype, _out_dtype(x, num_prefix_tokens, compute_dtype)
    backends.require("leff", backend, x, dtype)
    if x.shape[0] == 0:
        return x.new_empty((0, x.shape[1], out_features), dtype=out_dtype)
    from .launch import leff_inference_triton

    return leff_inference_triton(
        x.contiguous(),
        fold(parameters, eps, dtype),
        None if residual is None else residual.contiguous(),
        (height, width),
        num_prefix_tokens,
        activations,
        dtype,
        out_dtype,
    )


@torch.library.register_fake("ceit::leff_inference")
def _forward_fake(
    x, parameters, residual, eps, height, width, num_prefix_tokens, activation1, activation2, compute_dtype, backend
):
    activations = (activation1, activation2)
    out_features = _check(x, parameters, residual, eps, (height, width), num_prefix_tokens, activations, compute_dtype)
    dtype = _out_dtype(x, num_prefix_tokens, compute_dtype)
    return x.new_empty((x.shape[0], x.shape[1], out_features), dtype=dtype)


refuse_gradient(
    "ceit::leff_inference",
    "ceit::leff_inference has no gradient; ceit_kernels.FusedLeFF runs by plain PyTorch where one is needed",
)


@register_autocast("ceit::leff_inference")
def _autocast(dtype, x, parameters, residual, eps, *settings):
    *settings, compute_dtype, backend = settings
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.leff_inference(x, parameters, residual, eps, *settings, compute_dtype, backend)
