"""Hooks of transformers, which do nothing but where a call asks for hidden states or attentions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch

__all__ = ["has_working_hooks"]

_LIBRARY = "transformers.utils.output_capturing"
_INSTALLER = "install_output_capuring_hook"  # as it is spelled there


def has_working_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether any of a module's hooks might do something here and now.

    transformers puts hooks on parts of a model in the first call that returns hidden states, as all calls of SegFormer
    for segmentation do, and leaves them there: each captures one kind of output in calls that ask for it.
    """
    if not hooks or torch.compiler.is_compiling():  # compilers are not to see what follows
        return bool(hooks)
    library = sys.modules.get(_LIBRARY)
    return library is None or any(not _is_idle(hook, library) for hook in hooks.values())


def _is_idle(hook: Any, library: Any) -> bool:
    installer, active = getattr(library, _INSTALLER, None), getattr(library, "_active_collector", None)
    if not isinstance(hook, FunctionType) or not isinstance(installer, FunctionType) or active is None:
        return False
    code = hook.__code__
    if code not in installer.__code__.co_consts or "key" not in code.co_freevars:
        return False
    key = (hook.__closure__ or ())[code.co_freevars.index("key")].cell_contents
    collected = active.get()
    return collected is None or key not in collected
