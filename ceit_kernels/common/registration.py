"""What every registered operator needs beyond ``torch.library``'s own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_plain_call", "refuse_gradient", "register_autocast"]

_LIBRARY = torch.library.Library("ceit", "FRAGMENT")


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


def is_plain_call(x: Tensor) -> bool:
    """Whether nobody watches a call: no compiler, dispatch mode, function transform or subclass of tensors.

    Then what an operator does may be done without the operator, which costs a fraction of a millisecond on the CPU.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
