"""What every registered operator needs beyond ``torch.library``'s own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

__all__ = [
    "foreign_reason",
    "is_eager",
    "loop_over_batch",
    "refuse_gradient",
    "register_autocast",
    "unsupported_reason",
]

_LIBRARY = torch.library.Library("ceit", "FRAGMENT")

# PyTorch's own, and what compilers and dispatch modes put in their place.
_KNOWN_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))


def refuse_gradient(operator: str, message: str) -> None:
    """Make the gradient of an operator an error with this message.

    Without any formula a gradient, or the second-order term of ``torch.autograd.grad(..., create_graph=True)``, would
    be dropped in silence.
    """

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(message)

    torch.library.register_autograd(operator, backward, setup_context=lambda ctx, inputs, output: None)


def register_autocast(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what an operator does under autocast, on CPU and CUDA.

    The decorated function gets autocast's dtype and the operator's arguments, and runs with autocast out of the way.
    ``torch.library.register_autocast`` can only cast every input.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for device_type, name in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            key = getattr(torch._C.DispatchKey, name)

            def kernel(*args: Any, device_type: str = device_type, key: Any = key) -> Any:
                with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                    return function(torch.get_autocast_dtype(device_type), *args)

            _LIBRARY.impl(operator.split("::")[1], kernel, name)
        return function

    return register


def loop_over_batch(operator: str) -> None:
    """Let ``torch.func.vmap`` call an operator once for every element of its batch.

    That is what derivatives of a batch of gradients need of a backward operator.
    """
    function = getattr(torch.ops.ceit, operator.split("::")[1]).default

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        placed = list(zip(arguments, in_dims, strict=True))
        results = [
            function(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in placed))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(operator, rule)


def is_eager(x: Tensor) -> bool:
    """Whether a call runs in plain eager mode: no compiler, dispatch mode, function transform or tensor subclass.

    Then an operator's functions may run without the dispatcher, which costs a fraction of a millisecond on the CPU.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why only plain PyTorch can compute with these tensors here and now; None if operators of this package may.

    They have no formulas for the transforms of ``torch.func`` and for derivatives in forward mode, other runtimes do
    not know them, and what a subclass of tensors means by its data is its own business. Compilers and dispatch modes
    see registered operators.
    """
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return "a model is exported to ONNX, which does not know the kernels"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active, which the kernels do not have"
    elif forward_ad._current_level >= 0:
        return "derivatives are taken in forward mode, which the kernels do not have"
    elif torch._C._get_tracing_state() is not None:
        return "torch.jit traces the call, whose result other programs are to run"
    return foreign_reason(*tensors)


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
