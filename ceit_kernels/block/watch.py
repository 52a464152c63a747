"""Whether what was prepared for some modules still holds, which one call of many layers has to know in microseconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import is_

from torch import Tensor, nn

__all__ = ["Watch", "kept_by"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = ("eps", "num_heads", "scale", "layout", "num_prefix_tokens", "first_act", "approximate")


class Watch:
    """Modules as they are now, with all that are in them: their settings, tensors, mode and hooks.

    ``is_idle``: they are in evaluation mode, have no hooks, and their classes say what they do. ``can_tell``: so they
    are, and a change of a tensor would be seen, which it is not where one was made in inference mode.
    """

    def __init__(self, modules: Iterable[nn.Module], settings: Iterable[str] = ()) -> None:
        """Watch modules, and of them further attributes that ``settings`` names."""
        found = list(dict.fromkeys(child for module in modules for child in module.modules()))
        self._hooks = [getattr(module, kind) for module in found for kind in _HOOKS]
        own = not any(module.training or "forward" in module.__dict__ for module in found)
        self.is_idle = own and not any(self._hooks)
        self.can_tell = False
        if not self.is_idle:
            return
        self._places = [place for module in found for place in _places(module, (*_SETTINGS, *settings))]
        self._values = [space.get(name) for space, name in self._places]
        self._tensors = list({id(value): value for value in self._values if isinstance(value, Tensor)}.values())
        self.can_tell = not any(tensor.is_inference() for tensor in self._tensors)
        self._versions = self._present() if self.can_tell else []

    def __call__(self) -> bool:
        """Whether idle modules still are, and are what they were."""
        return (
            not any(self._hooks)
            and all(map(is_, [space.get(name) for space, name in self._places], self._values))
            and self._present() == self._versions
        )

    def _present(self) -> list[int]:
        tensors = self._tensors
        return [tensor.data_ptr() for tensor in tensors] + [tensor._version for tensor in tensors]


def _places(module: nn.Module, settings: Iterable[str]) -> Iterator[tuple[dict, str]]:
    """Where a module keeps what it is made of."""
    own = module.__dict__
    yield own, "training"
    yield own, "forward"
    for name in settings:
        if name in own:
            yield own, name
    for space in (module._parameters, module._buffers, module._modules):
        for name in space:
            yield space, name


class _Kept(dict):
    """What was prepared for a module and belongs to it; copies and pickles of the module go without."""

    def __deepcopy__(self, memo: dict) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


def kept_by(module: nn.Module) -> dict:
    """Where to keep what was prepared for a module, for as long as it lives."""
    kept = module.__dict__.get("_prepared_for_inference")
    if kept is None:
        kept = module.__dict__["_prepared_for_inference"] = _Kept()
    return kept
