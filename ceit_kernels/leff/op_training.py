"""``ceit::leff_forward`` and its backward: schema, checks, autograd, autocast; and a call outside any graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.calls import is_eager
from ..common.checks import check_device, check_shape
from ..common.flops import conv_backward_flops, conv_flops, register_flops
from ..common.registration import loop_over_batch, refuse_gradient, register_autocast
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
from .triton import NORM_ROWS

__all__ = ["leff_eagerly"]

_SETTINGS_SCHEMA = (
    "float[] eps, str[] norms, SymInt height, SymInt width, int num_prefix_tokens, str[] activations, str? group, "
    "ScalarType? compute_dtype, str backend"
)
_SAVED_NAMES = ("z1", "z2", "z3", "norm1", "norm2", "norm3", "count")
_PARAMETERS, _SAVED = len(PARAMETER_NAMES), len(_SAVED_NAMES)
# Of a layer's parameters those that may have a gradient: all but the running statistics, which come last.
_DIFFERENTIABLE = tuple(i for i in range(_PARAMETERS) if i % parameters_per_layer < 4)

torch.library.define(
    "ceit::leff_forward",
    f"(Tensor x, {PARAMETER_SCHEMA}, Tensor? residual, {_SETTINGS_SCHEMA}) "
    "-> (Tensor out, Tensor z1, Tensor z2, Tensor z3, Tensor norm1, Tensor norm2, Tensor norm3, Tensor count)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::leff_backward",
    f"(Tensor grad_out, Tensor x, {PARAMETER_SCHEMA}, {', '.join(f'Tensor {name}' for name in _SAVED_NAMES)}, "
    f"{_SETTINGS_SCHEMA}, bool need_x, bool[] needs) -> ({', '.join(['Tensor'] * (1 + len(_DIFFERENTIABLE)))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_forward(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None, settings: Settings) -> None:
    check(x, parameters, residual, settings)
    for name, mean, mode in zip(
        PARAMETER_NAMES[4::parameters_per_layer], parameters[4::parameters_per_layer], settings.norms, strict=True
    ):
        if mode == "frozen" and mean is None:
            raise ValueError(f"{name}: expected a tensor where the norm is frozen, got None")
    if settings.group is not None and x.shape[0] == 0:
        raise ValueError("x: expected an image in every process that shares its statistics, got an empty batch")


def _check_backward(
    grad_out: Tensor, x: Tensor, parameters: Sequence[Tensor | None], settings: Settings, needs: Sequence[bool]
) -> None:
    check(x, parameters, None, settings)
    check_shape("grad_out", grad_out, x.shape[0], x.shape[1], parameters[2 * parameters_per_layer].shape[0])
    check_device("grad_out", grad_out, x, "x")
    if len(needs) != len(_DIFFERENTIABLE):
        raise ValueError(f"needs: expected {len(_DIFFERENTIABLE)}, got {len(needs)}")
    for i, need in zip(_DIFFERENTIABLE, needs, strict=True):
        if need and parameters[i] is None:
            raise ValueError(f"needs: expected False for {PARAMETER_NAMES[i]}, which is None, got True")


def _outputs(make, x, parameters, residual, settings) -> tuple[Tensor, ...]:
    """Tensors like the results of the forward operator; what a layer without a norm lacks has no element."""
    dtype = settings.compute_dtype or x.dtype
    acc_dtype = torch.promote_types(dtype, torch.float32)
    hidden, outputs = parameters[0].shape[0], parameters[2 * parameters_per_layer].shape[0]
    tokens = x.shape[0] * settings.height * settings.width
    # The products of the CPU take whole images, prefix tokens included.
    tokens1 = x.shape[0] * x.shape[1] if settings.backend == "native" else tokens
    channels = zip(settings.norms, (hidden, hidden, outputs), strict=True)
    norms = ((0,) if mode == "none" else (NORM_ROWS, n) for mode, n in channels)
    return (
        make((x.shape[0], x.shape[1], outputs), dtype=out_dtype(x, residual, settings)),
        make((tokens1, hidden), dtype=dtype),
        make((tokens, hidden), dtype=dtype),
        make((0,) if settings.norms[2] == "none" else (tokens, outputs), dtype=dtype),
        *(make(shape, dtype=acc_dtype) for shape in norms),
        make((1 if "batch" in settings.norms else 0,), dtype=acc_dtype),
    )


def _forward(x, *arguments):
    parameters, residual, settings = arguments[:_PARAMETERS], arguments[_PARAMETERS], Settings(*arguments[-9:])
    _check_forward(x, parameters, residual, settings)
    require(x, parameters, settings)
    if x.shape[0] == 0:
        return _outputs(x.new_zeros, x, parameters, residual, settings)
    if settings.backend == "native":
        from .cpu import leff_forward_native as run
    else:
        from .triton.launch_forward import leff_forward_triton as run
    residual = None if residual is None else residual.contiguous()
    return run(x.contiguous(), parameters, residual, settings, out_dtype(x, residual, settings))


torch.library.impl("ceit::leff_forward", "default", _forward)


@torch.library.register_fake("ceit::leff_forward")
def _forward_fake(x, *arguments):
    parameters, residual, settings = arguments[:_PARAMETERS], arguments[_PARAMETERS], Settings(*arguments[-9:])
    _check_forward(x, parameters, residual, settings)
    return _outputs(x.new_empty, x, parameters, residual, settings)


def _unpack_backward(arguments):
    parameters, saved = arguments[:_PARAMETERS], arguments[_PARAMETERS : _PARAMETERS + _SAVED]
    *settings, need_x, needs = arguments[_PARAMETERS + _SAVED :]
    return parameters, saved, Settings(*settings), need_x, needs


def _empty_gradients(make, x, parameters, need_x, needs) -> tuple[Tensor, ...]:
    """Gradients of the right shape; one that is not needed has no element, because an operator must return tensors."""
    differentiable = [parameters[i] for i in _DIFFERENTIABLE]
    return tuple(
        make(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for tensor, need in zip((x, *differentiable), (need_x, *needs), strict=True)
    )


def _backward(grad_out, x, *arguments):
    parameters, _, settings, _, needs = _unpack_backward(arguments)
    _check_backward(grad_out, x, parameters, settings, needs)
    require(x, parameters, settings)
    return tuple(x.new_empty(0) if grad is None else grad for grad in _run_backward(grad_out, x, *arguments))


torch.library.impl("ceit::leff_backward", "default", _backward)


def _run_backward(grad_out, x, *arguments):
    """The backward operator's results, its arguments checked; None for those that are not needed."""
    parameters, saved, settings, need_x, needs = _unpack_backward(arguments)
    if x.shape[0] == 0:
        return _empty_gradients(torch.zeros_like, x, parameters, need_x, needs)
    if settings.backend == "native":
        from .cpu import leff_backward_native as run
    else:
        from .triton.launch_backward import leff_backward_triton as run
    return run(grad_out.contiguous(), x.contiguous(), parameters, saved, settings, need_x, needs)


@torch.library.register_fake("ceit::leff_backward")
def _backward_fake(grad_out, x, *arguments):
    parameters, _, settings, need_x, needs = _unpack_backward(arguments)
    _check_backward(grad_out, x, parameters, settings, needs)
    return _empty_gradients(torch.empty_like, x, parameters, need_x, needs)


def _setup_context(ctx, inputs, output):
    x, parameters, residual = inputs[0], list(inputs[1 : 1 + _PARAMETERS]), inputs[1 + _PARAMETERS]
    for i in range(_PARAMETERS):
        if i not in _DIFFERENTIABLE:
            parameters[i] = None
    ctx.save_for_backward(x, *parameters, *output[1:])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.settings = inputs[2 + _PARAMETERS :]
    ctx.mark_non_differentiable(*output[1:])
    # Or backward would get zeros of the size of z1, z2 and z3.
    ctx.set_materialize_grads(False)


def _gradients(backward, ctx, grad_out):
    """The gradients of the forward operator's arguments, by the backward operator or its implementation."""
    need_x, need_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[1 + _PARAMETERS]
    places = [1 + i for i in _DIFFERENTIABLE]
    needs = [ctx.needs_input_grad[place] for place in places]
    found: dict[int, Tensor] = {}
    if grad_out is not None and (need_x or any(needs)):
        gradients = backward(grad_out, *ctx.saved_tensors, *ctx.settings, need_x, needs)
        wanted = zip((0, *places), gradients, (need_x, *needs), strict=True)
        found = {place: gradient for place, gradient, need in wanted if need}
    if grad_out is not None and need_residual:
        found[1 + _PARAMETERS] = grad_out.to(ctx.residual_dtype)
    return tuple(found.get(place) for place in range(len(ctx.needs_input_grad)))


def _autograd_backward(ctx, grad_out, *no_grads):
    return _gradients(torch.ops.ceit.leff_backward, ctx, grad_out)


torch.library.register_autograd("ceit::leff_forward", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::leff_backward",
    "ceit_kernels.leff_block and FusedLeFF are differentiable once; for second derivatives run them under "
    'ceit_kernels.use_backend("reference")',
)
loop_over_batch("ceit::leff_backward")


@register_autocast("ceit::leff_forward")
def _autocast(dtype, x, *arguments):
    # The kernels round what they load, so autocast costs no cast of its own.
    *arguments, compute_dtype, backend = arguments
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.leff_forward(x, *arguments, compute_dtype, backend)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        results = _forward(x, *arguments)
        _setup_context(ctx, (x, *arguments), results)
        return results

    @staticmethod
    def backward(ctx, grad_out, *no_grads):
        # The registered operator where the gradient of this gradient is to be refused, or gradients come in batches.
        # Else forward checked it all.
        directly = grad_out is not None and is_eager(grad_out) and not torch.is_grad_enabled()
        return _gradients(_run_backward if directly else torch.ops.ceit.leff_backward, ctx, grad_out)


def leff_eagerly(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``ceit::leff_forward`` outside any graph, without the millisecond that a registered operator costs on the CPU.

    Args:
        x, arguments: of the operator, with autocast's dtype as ``compute_dtype``.
    """
    return _Eager.apply(x, *arguments)


@register_flops("ceit::leff_forward")
def _flops(x, *arguments, out_shape, **options):
    settings = Settings(*arguments[-9:])
    calls = convolutions(x, arguments[:_PARAMETERS], settings.height, settings.width)
    return sum(conv_flops(*call) for call in calls)


@register_flops("ceit::leff_backward")
def _backward_flops(grad_out, x, *arguments, out_shape, **options):
    parameters, _, settings, need_x, needs = _unpack_backward(arguments)
    flops = 0
    for i, call in enumerate(convolutions(x, parameters, settings.height, settings.width)):
        need_input = need_x or any(needs[: 4 * i])
        flops += conv_backward_flops(*call, need_input, needs[4 * i])
    return flops
