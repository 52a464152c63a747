"""When a part of the model may be computed without calling its module."""

from typing import TypeGuard, TypeVar

from torch import Tensor, compiler, jit, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ceit_kernels.common.children import has_own_methods, is_patched
from ceit_kernels.common.launch import records_eager

from .layers import has_hooks

Module = TypeVar("Module", bound=nn.Module)


def is_left_alone(module: nn.Module) -> bool:
    """Whether a call runs the methods that the class was written with and nothing else (no hook, not compiled)."""
    own = "forward" not in module.__dict__ and has_own_methods(module) and not is_patched(type(module))
    return own and module._compiled_call_impl is None and not has_hooks(module)


def is_exactly(module: nn.Module | None, kind: type[Module]) -> TypeGuard[Module]:
    """Whether calling a module runs the `forward` of `kind` and no hook.

    Subclasses, among them those that FSDP2 and parametrizations make, and wrappers may do more.
    """
    return module is not None and type(module) is kind and is_left_alone(module) and not _has_any_global_hook()


def is_symbolic(x: Tensor) -> bool:
    """Whether torch.fx is tracing: `x` has no values, and no shape that a branch could depend on."""
    return isinstance(x, Proxy)


def is_eager(x: Tensor) -> bool:
    """Whether a call computes now, so that one compiled call may take the place of many operators.

    False under a compiler, a tracer, a function transform or forward-mode differentiation, on the meta device and for
    subclasses of Tensor, unless what such calls launch is recorded.
    """
    return records_eager() or (
        not compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not jit.is_tracing()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )
