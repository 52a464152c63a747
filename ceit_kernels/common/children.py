"""Whether a fused module may read its children's tensors: one rule, for every fused module, at every call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .capturing import has_working_hooks
from .constant import constant_result

__all__ = [
    "ANY",
    "IDENTITY",
    "Classes",
    "child_reason",
    "children_reason",
    "convolution_reason",
    "declare_methods",
    "has_own",
    "has_own_methods",
    "held",
    "is_patched",
    "methods_of",
    "qualified_name",
    "trust",
]

# Classes of other libraries, which may not be there, by their qualified names.
Classes = Collection[type[nn.Module] | str] | None

ANY: Classes = None  # for a child that the fused module calls, whatever it is
IDENTITY: Classes = (nn.Identity,)

_CALL = nn.Module.__call__
_own: dict[tuple[type, str], Any] = {}  # methods of classes, as they were when somebody first asked
_methods: dict[type, tuple[str, ...]] = {nn.Conv2d: ("_conv_forward",)}

_SETTINGS = ("stride", "padding", "groups", "dilation", "padding_mode")


def children_reason(module: nn.Module, expected: Mapping[str, Classes], own: Collection[str] = ()) -> str | None:
    """Why a module must run by its plain ``forward``, which calls the children; None if their tensors may be read.

    They may where every child computes what its class says and nothing else: it is exactly of an expected class (an
    adapter, a quantised layer and a parametrised one are of another), with no hook and no ``forward`` of its own.
    Children that are not expected must do nothing.

    Args:
        module: the fused module.
        expected: the classes of each child whose tensors are read, ``ANY`` for one that is called.
        own: names of the parameters that the module has itself.
    """
    if _has_any_global_hook():
        return "a global hook of modules is set"
    if is_patched(type(module)):
        return "its class was given another forward"
    if not has_own_methods(module):
        return "it was given another method than its class has"
    state, found = module.__dict__, 0
    for kind in ("_parameters", "_buffers"):
        for name, tensor in state[kind].items():
            if tensor is not None and name not in own:
                return f"the kernels know nothing of {name}"
    for name, child in state["_modules"].items():
        if name in expected:
            found += 1
            reason = child_reason(name, child, expected[name])
        else:
            reason = None if child is None else child_reason(name, child, IDENTITY)
        if reason is not None:
            return reason
    for name in own:
        # Sharding puts what it has gathered beside them; a frozen module has buffers in their place.
        if name not in state["_parameters"] and name not in state and name not in state["_buffers"]:
            return f"the module has no {name}"
    if found != len(expected):
        return f"the module has no {next(name for name in expected if name not in state['_modules'])}"
    return None


def qualified_name(found: type | Callable[..., Any]) -> str:
    """The module and the name of a class, "torch.nn.modules.linear.Linear"."""
    return f"{found.__module__}.{found.__qualname__}"


def has_own(kind: type, name: str) -> bool:
    """Whether a class has the method that it was written with, and not one that was put in its place.

    Wrappers copy names, so that the module in which a function was compiled tells: a method is of the library that its
    class is of, and stays what it was when somebody first asked.
    """
    method: Any = getattr(kind, name, None)
    known = _own.get((kind, name))
    if known is None:
        owner = next((base for base in kind.__mro__ if name in vars(base)), kind)
        if not isinstance(method, FunctionType) or library_of(method) != owner.__module__.partition(".")[0]:
            return False
        known = _own[kind, name] = method
    return known is method


def library_of(function: Any) -> str:
    """The package in which a function was compiled; nothing for one that is not of Python."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def trust(kind: type[nn.Module]) -> None:
    """A class has the ``forward`` that somebody says how to fuse, whoever wrote that."""
    _own.setdefault((kind, "forward"), kind.forward)


def declare_methods(kind: type, *names: str, like: type | None = None) -> None:
    """Say which methods of a class its ``forward`` calls, in whose place an operator computes; or those of another."""
    names = names or _methods.get(like or kind, ())
    if names:
        _methods[kind] = names


def methods_of(kind: type) -> tuple[str, ...]:
    """``forward``, and what else is declared."""
    return "forward", *_methods.get(kind, ())


def has_own_methods(module: nn.Module) -> bool:
    """Whether a module has none of the declared methods of its class by itself."""
    names, state = _methods.get(type(module)), module.__dict__
    if torch.compiler.is_compiling():
        _watch_methods(module)
    return names is None or all(name not in state for name in names)


def _watch_methods(module: nn.Module) -> None:
    """Have a compiler look for other methods ahead of each call, as it does for attributes, not for keys of a dict."""
    plain = getattr(type(module), "plain_class", type(module))
    for name in methods_of(plain):
        _ = getattr(module, name), getattr(plain, name) is None


@constant_result
def is_patched(kind: type) -> bool:
    """Whether a class, or that which it was fused of, was given other methods than it was written with.

    Of its methods these are ``forward`` and those that are declared; and ``__call__``, as long as it is not PyTorch's
    own, whose tracers put theirs there.
    """
    kind = getattr(kind, "plain_class", kind)
    if kind.__call__ is not _CALL and library_of(kind.__call__) != "torch":
        return True
    names = _methods.get(kind)
    return not (has_own(kind, "forward") and (names is None or all(has_own(kind, name) for name in names)))


def held(module: nn.Module, name: str) -> Any:
    """A parameter or buffer of a module or None; looking it up as an attribute takes several times as long."""
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return getattr(module, name) if tensor is None else tensor


def child_reason(name: str, child: nn.Module, classes: Classes) -> str | None:
    """Why a child has to be called; None if reading its tensors is as good."""
    if classes is None:  # ANY
        return None
    if type(child) not in classes and qualified_name(type(child)) not in classes:
        names = [expected if isinstance(expected, str) else expected.__name__ for expected in classes]
        wanted = " or ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        return f"the kernels take {wanted} for {name}, not {type(child).__name__}"
    state = child.__dict__
    if (
        (state["_forward_hooks"] and has_working_hooks(state["_forward_hooks"]))
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has a hook"
    if "forward" in state or is_patched(type(child)) or not has_own_methods(child):
        return f"{name} has a forward of its own"
    return None


def convolution_reason(
    name: str,
    convolution: nn.Module,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int = 1,
) -> str | None:
    """Why a convolution is none that the kernels compute, without dilation and with zeros around; None if it is one."""
    state = convolution.__dict__
    found = tuple(map(state.get, _SETTINGS))
    expected = (stride, padding, groups, (1, 1), "zeros")
    if found == expected:
        return None
    setting, want, have = next(each for each in zip(_SETTINGS, expected, found, strict=True) if each[1] != each[2])
    return f"the kernels have {setting}={want} in {name}, not {have}"
