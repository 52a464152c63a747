"""LeFF as a function of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..common.arguments import names_its_arguments
from ..common.autocast import autocast_dtype
from ..common.calls import is_ordinary, needs_gradient, unsupported_reason
from ..common.checks import norm_dtype_reason
from ..common.launch import is_recording
from ..common.seen import Seen
from .activations import ACTIVATIONS
from .arguments import (
    NORM_TENSORS,
    Settings,
    check_call,
    check_weights,
    kernel_size_unsupported_reason,
    parameters_per_layer,
)
from .choice import call_operator, choose
from .grid import from_tokens, residual_to_tokens, to_tokens
from .norms import BatchNorm, norm_mode, plain_norm, process_group_of
from .op import leff_statistics_operator
from .reference import leff_reference

__all__ = ["leff_block", "leff_fused", "pack"]

_NAMES = tuple(
    name
    for i in range(3)
    for name in (f"weights[{i}]", f"biases[{i}]", *(f"norms[{i}].{tensor}" for tensor in NORM_TENSORS))
)

# Of calls that passed the checks: settings, what they compute in, and whether a gradient may be taken.
_checked: Seen[tuple[Settings, torch.dtype, bool]] = Seen()


@names_its_arguments
def leff_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (None, None, None),
    norms: Sequence[BatchNorm | None] = (None, None, None),
    *,
    activations: tuple[str, str] = ("gelu", "gelu"),
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    residual: Tensor | None = None,
    layout: str = "tokens",
) -> Tensor:
    """Locally-enhanced feed-forward block (CeiT, section 3.3): convolutions over the image that the tokens make.

    Pointwise convolution, norm, activation; depthwise convolution, norm, activation; pointwise convolution, norm. With
    ``activations=("identity", "gelu")`` and without norms it is the Mix-FFN of SegFormer and PVTv2. Differentiable once
    (any number of times by the reference).

    Args:
        x: tokens (B, P + H * W, C); an image (B, H, W, C) or (B, C, H, W) with the ``layout`` that says so.
        weights: (E, C, 1, 1) or (E, C), (E, 1, k, k), and (O, E, 1, 1) or (O, E); k is odd, and the kernels have 3, 5
            and 7.
        biases: (E,), (E,) and (O,), or None.
        norms: over E, E and O channels, or None. Running statistics are updated in place in training.
        activations: after the first two layers, of "gelu", "gelu_tanh", "silu", "relu", "relu6", "hardswish" and
            "identity".
        grid_size: (H, W) of tokens; a square if None.
        num_prefix_tokens: tokens P before the image's, which pass through unchanged; O is C where there are any.
        residual: of the result's shape, added to all of it; nothing if None.
        layout: "tokens", "NHWC" or "NCHW", of x, residual and result. "NCHW" costs no copy where it is channels-last
            in memory, nor on the CPU without gradients; the result is in memory as x is.

    Returns:
        Tokens (B, P + H * W, O), or an image of O channels; under autocast of the dtype that plain PyTorch gives.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong, or a batch has a single value to
            take statistics of.
        BackendError: the backend that was asked for cannot serve the call.
    """
    for name, given in (("weights", weights), ("biases", biases), ("norms", norms)):
        if len(given) != 3:
            raise ValueError(f"{name}: expected one for each of 3 layers, got {len(given)}")
    check_weights(weights, _NAMES[::parameters_per_layer])
    for i, norm in enumerate(norms):
        if norm is not None and not norm.training and (norm.running_mean is None or norm.running_var is None):
            raise ValueError(f"norms[{i}]: expected running statistics where it is not training, got None")
    where = (activations, grid_size, num_prefix_tokens, residual, layout)
    out = leff_fused(x, weights, biases, norms, *where, _NAMES)
    if out is not None:
        return out
    tokens, grid_size = to_tokens(x, weights[0].shape[1], layout, num_prefix_tokens, grid_size)
    if residual is not None:
        residual = residual_to_tokens(residual, tokens, weights[2].shape[0], layout, grid_size)
    plain_norms = [plain_norm(f"norms[{i}]", norm) for i, norm in enumerate(norms)]
    functions = [ACTIVATIONS[name] for name in activations]
    out = leff_reference(tokens, weights, biases, plain_norms, functions, grid_size, num_prefix_tokens, residual)
    return from_tokens(out, layout, grid_size, x)


def leff_fused(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[BatchNorm | None],
    activations: tuple[str, str],
    grid_size: tuple[int, int] | None,
    num_prefix_tokens: int,
    residual: Tensor | None,
    layout: str,
    names: Sequence[str],
    only_statistics: bool = False,
) -> Tensor | None:
    """``leff_block`` by a registered operator; None for a call that the reference serves.

    Args:
        weights: of shapes that ``check_weights`` lets pass.
        names: of the parameters in messages, in the order of ``arguments.PARAMETER_NAMES``.
        only_statistics: nobody looks at the result, which may be x then, nor takes a gradient.
    """
    parameters = pack(weights, biases, norms)
    eps = tuple([0.0 if norm is None else norm.eps for norm in norms])
    modes = tuple([norm_mode(norm) for norm in norms])
    group, unsupported = process_group_of(norms)
    kind = eps, modes, group, unsupported, tuple(activations), num_prefix_tokens, layout, torch.is_grad_enabled()
    tensors = x, residual, *parameters
    checked = _checked.find(kind, tensors) if is_ordinary() else None
    if checked is None:
        foreign = unsupported_reason(*tensors)
        if foreign is not None:
            backends.leave_to_reference("leff", foreign)
            return None
    tokens, grid_size = to_tokens(x, weights[0].shape[1], layout, num_prefix_tokens, grid_size)
    if residual is not None:
        residual = residual_to_tokens(residual, tokens, weights[2].shape[0], layout, grid_size)
    if checked is not None and grid_size == (checked[0].height, checked[0].width):
        settings, dtype, training = checked
    else:
        where = (*grid_size, num_prefix_tokens, tuple(activations))
        settings = Settings(eps, modes, *where, group, autocast_dtype(tokens), "reference")
        check_call(tokens, parameters, residual, settings, names)
        dtype = settings.compute_dtype or tokens.dtype
        unsupported = unsupported or kernel_size_unsupported_reason(weights[1])
        if not _are_all(dtype, parameters):
            for first in range(2, len(parameters), parameters_per_layer):
                # Plain PyTorch says what it lacks.
                name, of_norm = names[first].removesuffix(".weight"), parameters[first : first + len(NORM_TENSORS)]
                unsupported = unsupported or norm_dtype_reason(name, dtype, *of_norm)
        training = "batch" in modes or needs_gradient(*tensors)
        if unsupported is None and is_ordinary():
            _checked.keep(kind, tensors, (settings, dtype, training))
    backend = backends.choose("leff", tokens, dtype, unsupported).backend
    if backend == "triton" and backends.current_backend("leff") == "auto" and not is_recording():
        backend = choose(tokens, parameters, norms, residual, settings, training)
    if backend == "reference":
        return None
    call = tokens, parameters, residual, Settings(*settings[:-1], backend)
    if only_statistics and modes[2] == "batch" and backend != "native":
        call_operator(*call, training, norms, leff_statistics_operator)
        return x
    return from_tokens(call_operator(*call, training, norms)[0], layout, grid_size, x)


def _are_all(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> bool:
    return not [None for tensor in tensors if tensor is not None and tensor.dtype is not dtype]


def pack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[BatchNorm | None]
) -> list[Tensor | None]:
    """The parameters in the order of the registered operators."""
    parameters: list[Tensor | None] = []
    for weight, bias, norm in zip(weights, biases, norms, strict=True):
        of_norm = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        parameters += [weight, bias, *of_norm]
    return parameters
