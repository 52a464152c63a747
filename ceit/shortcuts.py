"""When a part of the model may be computed by other means than calling it, so that nobody notices."""

from torch import Tensor, compiler, jit, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from .layers import is_watched


def is_left_alone(module: nn.Module) -> bool:
    """Whether a module's class says all that a call of it does: no hook, no `forward` of its own, not compiled."""
    return "forward" not in module.__dict__ and module._compiled_call_impl is None and not is_watched(module)


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module does what `kind` does and nobody would miss it.

    A subclass, which is also what FSDP2 and parametrisations make of a module, and a wrapper may do more.
    """
    return type(module) is kind and is_left_alone(module) and not _has_any_global_hook()


def is_symbolic(x: Tensor) -> bool:
    """Whether torch.fx is tracing: `x` has no values, and no shape that a branch could depend on."""
    return isinstance(x, Proxy)


def is_eager(x: Tensor) -> bool:
    """Whether a call computes here and now, so that compiled code may do in one call what takes many operators.

    It does not under a compiler or tracer, a function transform or forward-mode differentiation, nor on the meta device
    or for a subclass of tensors.
    """
    return (
        not compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not jit.is_tracing()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )
