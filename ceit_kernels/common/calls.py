"""What kind of call it is: whether operators of this package may run, and whether they need the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .children import library_of
from .constant import constant_result
from .launch import is_recording, records_eager

__all__ = [
    "are_eager",
    "foreign_reason",
    "functions_reason",
    "is_eager",
    "is_ordinary",
    "needs_gradient",
    "unsupported_reason",
]

# PyTorch's own, and what compilers and dispatch modes put in their place.
_KNOWN_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))

# What the modules call that the kernels stand for.
_NAMES = (
    *("linear", "conv2d", "pad", "batch_norm", "layer_norm", "max_pool2d", "interpolate", "dropout", "softmax"),
    "adaptive_avg_pool2d",
    *("gelu", "silu", "relu", "hardtanh", "relu6", "hardswish", "hardsigmoid", "scaled_dot_product_attention"),
)
_functions = itemgetter(*_NAMES)
_IN_USE = vars(F)
_OWN = tuple(function if library_of(function) in ("", "torch") else None for function in _functions(_IN_USE))


def is_eager(x: Tensor) -> bool:
    """Whether a call runs in plain eager mode: no compiler, dispatch mode, function transform or tensor subclass.

    Then an operator's functions may run without the dispatcher, which costs a fraction of a millisecond on the CPU.
    """
    return are_eager((x,))


def are_eager(tensors: Iterable[Tensor | None]) -> bool:
    """``is_eager`` of all of the tensors that are there."""
    if _is_seen_by_others():
        return records_eager()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS or torch._C._functorch.is_legacy_batchedtensor(tensor):
            return False
    return True


def is_ordinary() -> bool:
    """Whether nothing around a call changes what it means: no compiler, mode, transform, autocast or recording."""
    return not (
        _is_seen_by_others()
        or functions_reason() is not None
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or is_recording()
        or torch._C._get_tracing_state() is not None
    )


def _is_seen_by_others() -> bool:
    """Whether a compiler, a dispatch mode or a transform of functions is to see what a call does."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@constant_result
def _are_replaced() -> bool:
    return _functions(_IN_USE) != _OWN


def functions_reason() -> str | None:
    """Why the functions of PyTorch that modules call have to be called; None if they compute what they say."""
    if _are_replaced():
        return "a function of torch.nn.functional was replaced"
    # Exporters and what counts launches put their own there.
    others = torch._C._len_torch_function_stack() and not (torch.compiler.is_compiling() or is_recording())
    if others and not _KNOWN_MODES.issuperset(_active_modes()):
        return "a mode that sees PyTorch's functions is active"
    return None


def _active_modes() -> list[type]:
    return [type(torch._C._get_function_stack_at(i)) for i in range(torch._C._len_torch_function_stack())]


# The default device, and what was there before this package, as an emulated GPU is.
_KNOWN_MODES = {DeviceContext, *_active_modes()}


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of these tensors may be taken through the call."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop takes half the time of any()
            if tensor is not None and tensor.requires_grad:
                # Which compilers cannot trace.
                return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return False


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why only plain PyTorch can compute with these tensors here and now; None if operators of this package may.

    They have no formulas for the transforms of ``torch.func`` and for derivatives in forward mode, other runtimes do
    not know them, and what a subclass of tensors means by its data is its own business, as what is put in the place of
    PyTorch's functions is. Compilers and dispatch modes see registered operators.
    """
    functions = functions_reason()
    if functions is not None:
        return functions
    if torch.compiler.is_compiling():
        for name in _NAMES:  # to be looked at ahead of each call
            _ = getattr(F, name) is None
        if torch.onnx.is_in_onnx_export():
            return "a model is exported to ONNX, which does not know the kernels"
    elif torch._C._get_tracing_state() is not None:
        return "torch.jit traces the call, whose result other programs are to run"
    return _transform_reason() or foreign_reason(*tensors)


@constant_result  # what compilers trace, and they look at it ahead of each call
def _transform_reason() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active, which the kernels do not have"
    if forward_ad._current_level >= 0:
        return "derivatives are taken in forward mode, which the kernels do not have"
    return None


def foreign_reason(*tensors: Tensor | None) -> str | None:
    """Why operators of this package cannot read some tensors; None if they can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _KNOWN_TENSORS:
            return f"the kernels do not know {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"the kernels do not take tensors of layout {tensor.layout}"
        if tensor.dtype.is_complex:
            return f"the kernels do not compute in {tensor.dtype}"
    return None
