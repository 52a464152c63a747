"""``ceit::leff`` with its gradient; ``ceit::leff_statistics``, what its norms take of a batch; and
``ceit::leff_inference``: norms there are scales and shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.checks import check_device, check_shape
from ..common.flops import conv_backward_flops, conv_flops
from ..common.operator import Operator, gradients_like
from .arguments import (
    PARAMETER_NAMES,
    PARAMETER_SCHEMA,
    SAVED_NAMES,
    Settings,
    check,
    convolutions,
    kernel_size_unsupported_reason,
    out_dtype,
    parameters_per_layer,
    settings_of,
)
from .grid import empty_tokens_like, in_memory_order, is_planar
from .norms import update_running_statistics
from .pipelines import code
from .triton import NORM_ROWS

__all__ = ["leff_inference_operator", "leff_operator", "leff_statistics_operator"]

_SETTINGS_SCHEMA = (
    "float[] eps, str[] norms, SymInt height, SymInt width, int num_prefix_tokens, str[] activations, str? group, "
    "ScalarType? compute_dtype, str backend"
)
_PARAMETERS, _SAVED = len(PARAMETER_NAMES), len(SAVED_NAMES)
# Of a layer's parameters those that may have a gradient: all but the running statistics, which come last.
_DIFFERENTIABLE = tuple(i for i in range(_PARAMETERS) if i % parameters_per_layer < 4)
_RUNNING = tuple(i for i in range(_PARAMETERS) if i not in _DIFFERENTIABLE)


class _LeFFInference(Operator):
    name, operator = "leff_inference", "leff"
    schema = (
        f"(Tensor x, {PARAMETER_SCHEMA}, Tensor? residual, float[] eps, SymInt height, SymInt width, "
        "int num_prefix_tokens, str[] activations, ScalarType? compute_dtype, str backend) -> Tensor"
    )
    public_name = "ceit_kernels.leff_block"

    def check(self, x, *inputs):
        check(x, *self._unpack(inputs))

    def unsupported(self, x, *inputs):
        return kernel_size_unsupported_reason(inputs[parameters_per_layer])

    def forward(self, x, *inputs):
        parameters, residual, settings = self._unpack(inputs)
        if x.shape[0] == 0:
            return self.fake(x, *inputs)
        run = code("inference", settings.backend)
        planar = _is_planar(x, settings)
        dtype = out_dtype(x, residual, settings)
        residual = None if residual is None else in_memory_order(residual, planar)
        return run(in_memory_order(x, planar), parameters, residual, settings, dtype)

    def fake(self, x, *inputs):
        parameters, residual, settings = self._unpack(inputs)
        out_features = parameters[2 * parameters_per_layer].shape[0]
        return empty_tokens_like(x, out_features, out_dtype(x, residual, settings), _is_planar(x, settings))

    def flops(self, x, *inputs, **options):
        height, width = inputs[_PARAMETERS + 2 : _PARAMETERS + 4]
        return sum(conv_flops(*call) for call in convolutions(x, inputs[:_PARAMETERS], height, width))

    @staticmethod
    def _unpack(inputs: Sequence[Any]) -> tuple[Sequence[Tensor | None], Tensor | None, Settings]:
        parameters = inputs[:_PARAMETERS]
        residual, eps, height, width, prefix, activations, *rest = inputs[_PARAMETERS:]
        norms = ["none" if mean is None else "frozen" for mean in parameters[4::parameters_per_layer]]
        return parameters, residual, settings_of(eps, norms, height, width, prefix, activations, None, *rest)


class _LeFF(Operator):
    """An eager call passes ``Settings`` in the place of their fields, and the norms, whose statistics it averages."""

    name, returned = "leff", 1
    schema = (
        f"(Tensor x, {PARAMETER_SCHEMA}, Tensor? residual, {_SETTINGS_SCHEMA}) "
        f"-> (Tensor out, {', '.join(f'Tensor {name}' for name in SAVED_NAMES)})"
    )
    backward_schema = (
        f"(Tensor grad_out, Tensor x, {PARAMETER_SCHEMA}, {', '.join(f'Tensor {name}' for name in SAVED_NAMES)}, "
        f"{_SETTINGS_SCHEMA}, bool need_x, bool[] needs) -> ({', '.join(['Tensor'] * (1 + len(_DIFFERENTIABLE)))})"
    )
    public_name = "ceit_kernels.leff_block"
    has_result: ClassVar[bool] = True  # or the first is not wanted

    def check(self, x, *inputs):
        parameters, residual, settings = self._unpack(inputs)
        check(x, parameters, residual, settings)
        for i, mode in zip(range(4, _PARAMETERS, parameters_per_layer), settings.norms, strict=True):
            if mode == "frozen" and parameters[i] is None:
                raise ValueError(f"{PARAMETER_NAMES[i]}: expected a tensor where the norm is frozen, got None")
        if settings.group is not None and x.shape[0] == 0:
            raise ValueError("x: expected an image in every process that shares its statistics, got an empty batch")

    def unsupported(self, x, *inputs):
        return kernel_size_unsupported_reason(inputs[parameters_per_layer])

    def forward(self, x, *inputs):
        parameters, residual, settings = self._unpack(inputs)
        norms = inputs[-1] if isinstance(inputs[-2], Settings) else None
        dtype = out_dtype(x, residual, settings)
        residual = None if residual is None else residual.contiguous()
        if x.shape[0] == 0:
            results = _results(x.new_zeros, x, parameters, residual, settings)
        elif settings.backend == "native":
            results = code("forward", "native")(x.contiguous(), parameters, residual, settings, dtype)
        else:
            run, dtype = code("forward", settings.backend), dtype if self.has_result else None
            return run(x.contiguous(), parameters, residual, settings, dtype, norms)  # it averages them by the way
        if norms is not None:
            tokens = x.shape[0] * settings.height * settings.width
            update_running_statistics(norms, results[4:7], results[7], tokens, settings.backend)
        return results

    def fake(self, x, *inputs):
        return _results(x.new_empty, x, *self._unpack(inputs))

    def flops(self, x, *inputs, **options):
        parameters, _, settings = self._unpack(inputs)
        return sum(conv_flops(*call) for call in convolutions(x, parameters, settings.height, settings.width))

    def save(self, ctx, inputs, results):
        x, parameters, residual = inputs[0], list(inputs[1 : 1 + _PARAMETERS]), inputs[1 + _PARAMETERS]
        for i in _RUNNING:
            parameters[i] = None
        ctx.save_for_backward(x, *parameters, *results[1:])
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.settings = self._unpack(inputs[1:])[2]

    def gradients(self, backward, ctx, grad_out, *_):
        need_x, *need_parameters = ctx.needs_input_grad[: 1 + _PARAMETERS]
        needs = [need_parameters[i] for i in _DIFFERENTIABLE]
        found = [None] * (2 + _PARAMETERS)
        if need_x or any(needs):
            settings = ctx.settings if backward is self.registered_backward else (ctx.settings,)
            found[0], *grads = backward(grad_out, *ctx.saved_tensors, *settings, need_x, needs)
            for i, grad in zip(_DIFFERENTIABLE, grads, strict=True):
                found[1 + i] = grad
        if ctx.residual_dtype is not None:
            found[1 + _PARAMETERS] = grad_out.to(ctx.residual_dtype)
        return found

    def check_backward(self, grad_out, x, *inputs):
        parameters, _, settings, _, needs = self._unpack_backward(inputs)
        check(x, parameters, None, settings)
        check_shape("grad_out", grad_out, x.shape[0], x.shape[1], parameters[2 * parameters_per_layer].shape[0])
        check_device("grad_out", grad_out, x, "x")
        if len(needs) != len(_DIFFERENTIABLE):
            raise ValueError(f"needs: expected {len(_DIFFERENTIABLE)}, got {len(needs)}")
        for i, need in zip(_DIFFERENTIABLE, needs, strict=True):
            if need and parameters[i] is None:
                raise ValueError(f"needs: expected False for {PARAMETER_NAMES[i]}, which is None, got True")

    def backward(self, grad_out, x, *inputs):
        parameters, saved, settings, need_x, needs = self._unpack_backward(inputs)
        if x.shape[0] == 0:
            return self._gradients_like(x, parameters, need_x, needs, torch.zeros_like)
        run = code("backward", settings.backend)
        # Results of the registered operator are tensors of their own.
        shares = {"shares": True} if settings is inputs[_PARAMETERS + _SAVED] and settings.backend != "native" else {}
        return run(grad_out.contiguous(), x.contiguous(), parameters, saved, settings, need_x, needs, **shares)

    def fake_backward(self, grad_out, x, *inputs):
        parameters, _, _, need_x, needs = self._unpack_backward(inputs)
        return self._gradients_like(x, parameters, need_x, needs, torch.empty_like)

    def backward_flops(self, grad_out, x, *inputs, **options):
        parameters, _, settings, need_x, needs = self._unpack_backward(inputs)
        flops = 0
        for i, call in enumerate(convolutions(x, parameters, settings.height, settings.width)):
            flops += conv_backward_flops(*call, need_x or any(needs[: 4 * i]), needs[4 * i])
        return flops

    @staticmethod
    def _unpack(inputs: Sequence[Any]) -> tuple[Sequence[Tensor | None], Tensor | None, Settings]:
        return inputs[:_PARAMETERS], inputs[_PARAMETERS], _settings(*inputs[_PARAMETERS + 1 :])

    @staticmethod
    def _unpack_backward(inputs: Sequence[Any]):
        parameters, saved = inputs[:_PARAMETERS], inputs[_PARAMETERS : _PARAMETERS + _SAVED]
        *settings, need_x, needs = inputs[_PARAMETERS + _SAVED :]
        return parameters, saved, _settings(*settings), need_x, needs

    @staticmethod
    def _gradients_like(x, parameters, need_x, needs, make):
        return gradients_like((x, *(parameters[i] for i in _DIFFERENTIABLE)), (need_x, *needs), make)


class _LeFFStatistics(_LeFF):
    """By ``ceit::leff`` without its result, which on a GPU takes a pass over the tokens less."""

    name, operator, has_result = "leff_statistics", "leff", False
    schema = (
        f"(Tensor x, {PARAMETER_SCHEMA}, Tensor? residual, {_SETTINGS_SCHEMA}) "
        f"-> ({', '.join(f'Tensor {name}' for name in SAVED_NAMES[3:])})"
    )
    backward_schema = ""

    def forward(self, x, *inputs):
        return super().forward(x, *inputs)[4:]

    def fake(self, x, *inputs):
        return super().fake(x, *inputs)[4:]


def _settings(first: Any, *others: Any) -> Settings:
    """The settings, which eager calls pass as they are, and the registered operator one by one."""
    return first if isinstance(first, Settings) else settings_of(first, *others)


def _is_planar(x: Tensor, settings: Settings) -> bool:
    """Whether inference takes tokens as those of an image in planes."""
    return settings.backend == "native" and settings.num_prefix_tokens == 0 and is_planar(x)


def _results(make, x, parameters, residual, settings) -> tuple[Tensor, ...]:
    """Tensors like the results of the forward operator; what a layer without a norm lacks has no element."""
    dtype = settings.compute_dtype or x.dtype
    acc_dtype = torch.promote_types(dtype, torch.float32)
    hidden, outputs = parameters[0].shape[0], parameters[2 * parameters_per_layer].shape[0]
    tokens = x.shape[0] * settings.height * settings.width
    # The GEMMs of the CPU and of libraries take whole images, prefix tokens included.
    tokens1 = x.shape[0] * x.shape[1] if settings.backend in ("native", "library") else tokens
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


leff_inference_operator, leff_operator, leff_statistics_operator = _LeFFInference(), _LeFF(), _LeFFStatistics()
