"""Whether modules of a snapshot are what they were when something was prepared of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .capturing import has_working_hooks
from .children import has_own, is_patched

__all__ = ["Intact"]


class Intact:
    """What a module and those within it are, and what they were when ``remember`` was called.

    Args:
        modules: the module first.
        method: what the module is called by.
    """

    def __init__(self, modules: Sequence[nn.Module], method: str = "forward") -> None:
        attributes = [vars(module) for module in modules]
        # The module's own run around it, and hooks of gradients have nothing to do.
        self._hooks = [state["_forward_hooks"] for state in attributes[1:]]
        self._pre_hooks = [state["_forward_pre_hooks"] for state in attributes[1:]]
        self._within = modules[1:]
        self._classes = list(map(type, self._within))
        self._called = getattr(type(modules[0]), "plain_class", type(modules[0])), method
        self._kinds = list(dict.fromkeys((type(modules[0]), *self._classes)))
        children = [state["_modules"] for state in attributes]
        tensors = [state[name] for state in attributes for name in ("_parameters", "_buffers") if state[name]]
        self._states = [*attributes, *children, *tensors]

    def remember(self) -> None:
        """The module has what was prepared of it."""
        self._states_then = list(map(dict, self._states))

    def addresses(self) -> list[int]:
        """Of the objects that ``holds`` reads, each followed by the cache lines that it has elsewhere, as a dict."""
        dicts = [*self._states, *self._states_then]
        values = (value for state in self._states for value in state.values())
        lines = dict.fromkeys(map(id, (*self._within, *values)), 0)
        lines.update((id(state), 2 + len(state) * 24 // 64) for state in dicts)
        return [number for pair in lines.items() for number in pair]

    def holds(self) -> bool:
        """Whether nothing was done to the modules since: no hook, and every attribute and class as it was."""
        if any(self._pre_hooks) or (any(self._hooks) and any(map(has_working_hooks, self._hooks))):
            return False
        if list(map(type, self._within)) != self._classes:
            return False
        if not has_own(*self._called) or any(map(is_patched, self._kinds)):
            return False
        try:
            return self._states == self._states_then
        except (RuntimeError, ValueError):  # another tensor: of equal objects one look is enough
            return False
