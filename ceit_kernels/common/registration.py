"""What every registered operator needs beyond ``torch.library``'s own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["loop_over_batch", "refuse_gradient", "register_autocast"]

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
