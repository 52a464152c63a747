"""``ceit::leff_inference``: schema, checks, autocast. It has no gradient: ``ceit::leff_forward`` has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.flops import conv_flops, register_flops
from ..common.registration import refuse_gradient, register_autocast
from .arguments import (
    PARAMETER_NAMES,
    PARAMETER_SCHEMA,
    Settings,
    check,
    convolutions,
    out_dtype,
    parameters_per_layer,
    require,
)

__all__ = ["leff_inference_eagerly"]

torch.library.define(
    "ceit::leff_inference",
    f"(Tensor x, {PARAMETER_SCHEMA}, Tensor? residual, float[] eps, SymInt height, SymInt width, "
    "int num_prefix_tokens, str[] activations, ScalarType? compute_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _unpack(x, arguments) -> tuple[Any, Any, Settings]:
    """The parameters, the residual and the settings of a call, checked."""
    count = len(PARAMETER_NAMES)
    parameters, (residual, eps, height, width, prefix, activations, *rest) = arguments[:count], arguments[count:]
    norms = ["none" if mean is None else "frozen" for mean in parameters[4::parameters_per_layer]]
    settings = Settings(eps, norms, height, width, prefix, activations, None, *rest)
    check(x, parameters, residual, settings)
    return parameters, residual, settings


@torch.library.impl("ceit::leff_inference", "default")
def _forward(x, *arguments):
    parameters, residual, settings = _unpack(x, arguments)
    require(x, parameters, settings)
    return leff_inference_eagerly(x, parameters, residual, settings)


@torch.library.register_fake("ceit::leff_inference")
def _forward_fake(x, *arguments):
    parameters, residual, settings = _unpack(x, arguments)
    dtype = out_dtype(x, residual, settings)
    return x.new_empty((x.shape[0], x.shape[1], parameters[12].shape[0]), dtype=dtype)


refuse_gradient(
    "ceit::leff_inference",
    "ceit::leff_inference has no gradient; ceit_kernels.FusedLeFF calls ceit::leff_forward where one is needed",
)


@register_flops("ceit::leff_inference")
def _flops(x, *arguments, out_shape, **options):
    count = len(PARAMETER_NAMES)
    height, width = arguments[count + 2 : count + 4]
    return sum(conv_flops(*call) for call in convolutions(x, arguments[:count], height, width))


@register_autocast("ceit::leff_inference")
def _autocast(dtype, x, *arguments):
    *arguments, compute_dtype, backend = arguments
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.leff_inference(x, *arguments, compute_dtype, backend)


def leff_inference_eagerly(
    x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None, settings: Settings
) -> Tensor:
    """``ceit::leff_inference`` without the registered operator, its arguments checked.

    Args:
        x, residual: tokens.
        parameters: as of the operator.
        settings: with autocast's dtype as ``compute_dtype``.
    """
    result_dtype = out_dtype(x, residual, settings)
    if x.shape[0] == 0:
        return x.new_empty((0, x.shape[1], parameters[12].shape[0]), dtype=result_dtype)
    if settings.backend == "native":
        from .cpu import leff_inference_native as run
    else:
        from .triton.launch_inference import leff_inference_triton as run
    residual = None if residual is None else residual.contiguous()
    return run(x.contiguous(), parameters, residual, settings, result_dtype)
