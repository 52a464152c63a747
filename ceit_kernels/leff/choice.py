"""Which backend serves a call on a GPU where the user left that open: the fastest, as far as that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from ..common.calls import is_eager, needs_gradient
from ..common.choice import Run, fastest
from ..common.constant import constant_result
from ..common.launch import compute_capability
from ..common.operator import Operator
from .activations import ACTIVATIONS
from .arguments import Settings, out_dtype, parameters_per_layer
from .norms import BatchNorm, plain_norm, update_running_statistics
from .op import leff_inference_operator, leff_operator
from .reference import leff_reference

__all__ = ["call_operator", "choose"]

# Chips whose machine code was looked at; and from so many channels on the fused kernels are estimated to lose.
_KNOWN_CHIPS = (80, 86, 89, 90, 100, 120)
_WIDE = 256


def choose(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    norms: Sequence[BatchNorm | None],
    residual: Tensor | None,
    settings: Settings,
    training: bool,
) -> str:
    """The backend of a call that any backend for GPUs may serve: the fastest, as far as that is known.

    Args:
        x, residual: tokens.
        parameters: the tensors of ``arguments.PARAMETER_NAMES``.
        norms: of the layers.
        settings: of the call.
        training: whether its gradients may be wanted.
    """
    rule = _rule(x.shape[2], x.device.index)
    # Processes that wait for one another go the same way.
    if settings.group is not None or not is_eager(x):
        return rule

    def runs() -> dict[str, Run]:
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
        ]
        own = leaves[0], leaves[1:], None if residual is None else residual.detach()
        found = {
            name: partial(call_operator, *own, settings._replace(backend=name), training)
            for name in ("triton", "library")
        }
        found["reference"] = partial(_plain, *own, norms, settings)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        generator = torch.Generator(x.device).manual_seed(0)
        shape, kind = (*x.shape[:2], weight3.shape[0]), out_dtype(x, residual, settings)
        grad_out = torch.randn(shape, generator=generator, dtype=kind, device=x.device)
        return {name: partial(_step, run, wanted, grad_out) for name, run in found.items()}

    tensors = x, *parameters
    needs = [needs_gradient(t) for t in tensors]
    weight1, weight2, weight3 = cast("list[Tensor]", parameters[::parameters_per_layer])
    sizes = x.shape[2], weight1.shape[0], weight3.shape[0], weight2.shape[-1]
    # Batches of about one size share a finding.
    tokens = 1 << (x.shape[0] * settings.height * settings.width - 1).bit_length()
    call = _described(training, tokens, sizes, settings, residual is not None, x.dtype, tuple(needs))
    return fastest(call, x, settings.compute_dtype or x.dtype, "reference", runs, rule)


@cache
def _described(
    training: bool,
    tokens: int,
    sizes: tuple[int, ...],
    settings: Settings,
    residual: bool,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> str:
    """A kind of call in words."""
    channels, hidden, outputs, kernel = sizes
    fields = {
        "tokens": tokens,
        "H": settings.height,
        "W": settings.width,
        "C": channels,
        "E": hidden,
        "O": outputs,
        "kernel": kernel,
        "norms": "+".join(settings.norms),
        "activations": "+".join(settings.activations),
        "residual": residual,
        "x": str(dtype).removeprefix("torch."),
        "gradients": sum(need << i for i, need in enumerate(needs)),
    }
    phase = "training" if training else "inference"
    return f"leff {phase}|" + ",".join(f"{name}={field}" for name, field in fields.items())


@constant_result
def _rule(channels: int, device_index: int | None) -> str:
    return "library" if channels >= _WIDE or compute_capability(device_index) not in _KNOWN_CHIPS else "triton"


def call_operator(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    training: bool,
    norms: Sequence[BatchNorm | None] | None = None,
    trained: Operator = leff_operator,
) -> tuple[Tensor, ...]:
    """The results of the operator of inference, or of that of training, which averages the running statistics of the
    norms.
    """
    if not training:
        where = settings.height, settings.width, settings.num_prefix_tokens, settings.activations
        inputs = x, *parameters, residual, settings.eps, *where, settings.compute_dtype
        return (leff_inference_operator(*inputs, settings.backend),)
    # Running statistics that are about to change are no input of the operator.
    inputs = list(parameters)
    for first, mode in zip(range(0, len(inputs), parameters_per_layer), settings.norms, strict=True):
        if mode == "batch":
            inputs[first + 4 : first + 6] = (None, None)
    if is_eager(x):
        return trained.eager(x, *inputs, residual, settings, norms)
    results = trained.registered(x, *inputs, residual, *settings)
    if norms is not None:
        tokens = x.shape[0] * settings.height * settings.width
        update_running_statistics(norms, results[-4:-1], results[-1], tokens, settings.backend)
    return results


def _plain(
    x: Tensor,
    parameters: Sequence[Any],
    residual: Tensor | None,
    norms: Sequence[BatchNorm | None],
    settings: Settings,
) -> tuple[Tensor]:
    """The call by plain PyTorch, which leaves the running statistics as they are."""
    weights, biases = parameters[::parameters_per_layer], parameters[1::parameters_per_layer]
    layers = []
    for i, norm in enumerate(norms):
        if norm is not None:
            weight, bias = parameters[i * parameters_per_layer + 2 :][:2]
            mean, variance = (None if t is None else t.clone() for t in (norm.running_mean, norm.running_var))
            norm = norm._replace(running_mean=mean, running_var=variance, weight=weight, bias=bias)
            norm = norm._replace(momentum=norm.momentum or 0.0, num_batches_tracked=None)
        layers.append(plain_norm("norm", norm))
    functions = [ACTIVATIONS[name] for name in settings.activations]
    grid = settings.height, settings.width
    return (leff_reference(x, weights, biases, layers, functions, grid, settings.num_prefix_tokens, residual),)


def _step(run: Callable[[], tuple[Tensor, ...]], wanted: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The result and the gradients of tokens and weights; those of vectors may be nothing but rounding."""
    out = run()[0]
    if not wanted:
        return [out]
    gradients = torch.autograd.grad(out, wanted, grad_out)
    return [out.detach(), *(gradient for gradient in gradients if gradient.dim() > 1)]
