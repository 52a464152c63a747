"""Snapshots of models for inference, prepared once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .adapters.folding import fold_norms
from .common.arguments import names_its_arguments
from .common.graphs import Graphs
from .common.intact import Intact
from .common.module import Fusion
from .convnet import FrozenConvnet
from .fuse import fuse_modules, warn_of_nothing
from .graphs import graph_settings, inputs_reason
from .operators import OPERATORS

__all__ = ["Frozen", "freeze", "register_freezing"]

_FROZEN = [spec.frozen_class() for spec in OPERATORS.values() if spec.frozen]


class Whole(Protocol):
    """A whole model as one call; None for an input that takes the model's own calls."""

    def __call__(self, x: Tensor) -> Tensor | None: ...


Model = TypeVar("Model", bound=nn.Module)
_whole: dict[type[nn.Module], Callable[[Any], Whole | None]] = {}


def register_freezing(model_class: type[Model], prepare: Callable[[Model], Whole | None]) -> None:
    """Tell ``freeze`` how a whole model of a class is computed in one call.

    Args:
        model_class: the class, exactly.
        prepare: makes of a model in evaluation mode, whose tensors do not change any more, a function of its input that
            returns None for what it does not serve; or None where the model takes other calls.
    """
    _whole[model_class] = prepare


@names_its_arguments
def freeze(model: nn.Module, *, cuda_graphs: bool = False) -> Frozen:
    """A snapshot of a model for inference, with copies of its own, folded and prepacked: no later change reaches it.

    What a model for inference is to other runtimes. The model itself stays live: it follows whatever is done to its
    weights, and prepares them in every call. Move and cast it before freezing it.

    Args:
        model: any module; its modules that ``fuse`` knows are fused in the snapshot. A ``ceit.CeiT`` on the CPU becomes
            one compiled call.
        cuda_graphs: on a GPU, capture a CUDA graph at the second call with each shape of inputs and replay it from then
            on, as ``graphed`` does.

    Returns:
        A module without parameters whose ``forward`` is the model's, in evaluation mode.
    """
    return Frozen(model, cuda_graphs)


class Frozen(nn.Module):
    """What ``freeze`` returns; made by it alone.

    ``torch.save`` and ``torch.load`` take it whole. What would change it (training mode, gradients, a move, a cast, a
    state_dict) is an error. Hooks run, those that the model had and those put on the snapshot or its parts, and so does
    what is put in the place of a part; tensors of the snapshot's parts are not to be written to.
    """

    def __init__(self, model: nn.Module, cuda_graphs: bool = False) -> None:
        super().__init__()
        self.training = False
        self.cuda_graphs = cuda_graphs
        self.model = _copy_of(model)
        self.model.eval()  # whose result is nothing where a class overrides it
        fuse_modules(self.model)
        for module in self.model.modules():
            _parameters_to_buffers(module)
            module.register_load_state_dict_pre_hook(_refuse_loading)
        self._prepare()
        if not any(isinstance(module, (Fusion, FrozenConvnet)) for module in self.model.modules()):
            warn_of_nothing(self.model)

    def _prepare(self) -> None:
        prepare = _whole.get(type(self.model))
        self._whole = None if prepare is None else prepare(self.model)
        self._graphs = Graphs(self.model)
        modules = list(self.model.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        if self._whole is None:
            _freeze_parts(self.model)
        self._intact = Intact(modules)
        self._intact.remember()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model's ``forward`` returned when it was frozen, without gradients.

        Raises:
            RuntimeError: an input asks for a gradient.
        """
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*arguments, *options.values())
        ):
            raise RuntimeError("x: expected an input without gradient, for the model is frozen, got requires_grad=True")
        with torch.no_grad():
            if self._whole is None and not self.cuda_graphs:
                return self.model(*arguments, **options)
            if any(self._hooks):  # of parts, which the calls below do not make
                return self.model(*arguments, **options)
            if self._whole is not None and len(arguments) == 1 and not options and isinstance(arguments[0], Tensor):
                out = self._whole(arguments[0]) if self._intact.holds() else None
                if out is not None:
                    return out
            if self.cuda_graphs and inputs_reason(arguments, options) is None and self._intact.holds():
                return self._graphs(arguments, options, graph_settings())
            return self.model(*arguments, **options)

    @property
    def config(self) -> Any:
        """The configuration of a model of transformers."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the snapshot's tensors are."""
        return self._tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the snapshot's weights, of the first of them where they differ."""
        return self._tensor().dtype

    def _tensor(self) -> Tensor:
        found = next((tensor for tensor in self.model.buffers() if tensor.is_floating_point()), None)
        if found is None:
            raise AttributeError(f"this frozen {type(self.model).__name__} has no weights")
        return found

    def train(self, mode: bool = True) -> Frozen:
        """Refuse training mode; parts that were put into it, and new ones, are put into evaluation mode."""
        return _refuse("trained") if mode else super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Refuse gradients; new parts have none from then on."""
        return _refuse("trained") if requires_grad else super().requires_grad_(False)

    def load_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse other weights."""
        _refuse("loaded into")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        # As a part of a module whose load_state_dict was called.
        _refuse_loading(self, state_dict, prefix)

    def _apply(self, *arguments: Any, **options: Any) -> NoReturn:
        _refuse("moved or cast")

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to this processor or GPU is made again where it is loaded.
        return {name: value for name, value in self.__dict__.items() if name not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()


_MADE = "_whole", "_graphs", "_hooks", "_intact"


def _refuse_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    if any(name.startswith(prefix) for name in state_dict):
        _refuse("loaded into")


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"a frozen model cannot be {what}; do that to the model, then ceit_kernels.freeze it again")


def _copy_of(model: nn.Module) -> nn.Module:
    # PyTorch refuses to copy tensors with a history, which pruning and weight_norm leave in modules, calls in caches.
    with_history = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        for tensor in (value.values() if isinstance(value, dict) else (value,))
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    }
    return copy.deepcopy(model, with_history)


def _freeze_parts(module: nn.Module, within: bool = False) -> None:
    """Freeze the largest modules that are convolutions one after another, and of the others those that are fused.

    Norms are folded in what is neither: what a part of a frozen module gets later, such as a hook, sees it as it was.

    Args:
        within: as of ``fold_norms``.
    """
    if isinstance(module, (Frozen, FrozenConvnet)):  # the latter of a snapshot that shares it, by copy.copy
        return
    called = FrozenConvnet.freeze(module)
    if called is None:
        for frozen_class in _FROZEN:
            frozen_class.freeze(module)
        if isinstance(module, Fusion) and module.plain_reason() is None:
            if not module.calls_children:
                return  # reads what its children have
        else:
            within = fold_norms(module, within)
    for name, child in module.named_children():
        if called is None or name not in called:
            _freeze_parts(child, within)


def _parameters_to_buffers(module: nn.Module) -> None:
    for name, parameter in list(module._parameters.items()):
        del module._parameters[name]
        module.register_buffer(name, None if parameter is None else parameter.detach())
