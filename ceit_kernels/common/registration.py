"""What every registered operator needs beyond ``torch.library``'s own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["no_double_backward", "register_autocast"]

_LIBRARY = torch.library.Library("ceit", "FRAGMENT")


def no_double_backward(backward_operator: str, function: str) -> None:
    """Make the gradient of a backward operator an error.

    Without a formula of its own, ``torch.autograd.grad(..., create_graph=True)`` would drop the second-order term in
    silence. ``function`` is what the message calls the differentiable function.
    """

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{function} is differentiable once; for second derivatives run it under "
            'ceit_kernels.use_backend("reference")'
        )

    torch.library.register_autograd(backward_operator, backward, setup_context=lambda ctx, inputs, output: None)


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
