"""Modules that replay CUDA graphs: for the launches of a call the host pays once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, starmap
from operator import is_, methodcaller
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from .backends import current_backend
from .common.arguments import names_its_arguments
from .common.calls import functions_reason, is_eager
from .common.children import methods_of
from .common.graphs import Graphs
from .common.stopwatch import is_capturing
from .common.sync_norm import SyncBatchNorm2d
from .operators import OPERATORS

__all__ = ["Graphed", "graph_settings", "graphed", "inputs_reason"]

_log = logging.getLogger("ceit_kernels")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATES = 4  # of a model that is trained and evaluated in turns, whose graphs are kept
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@names_its_arguments
def graphed(model: nn.Module) -> Graphed:
    """A module that calls a model by CUDA graphs, one for each kind of call, forward and backward.

    It shares the model's parameters: train and load either. The first calls of a kind (sizes and types of the inputs,
    gradients or none, mode, autocast, backends) run as they are: three where gradients are wanted, otherwise one. The
    next one is captured, and from then on the graph is replayed, which takes the host one launch.

    Graphs are captured anew once anything that the model's modules hold is another object than at the capture: a
    parameter, its memory or whether it wants a gradient, a mode, a child, an attribute, a class, its ``forward``. Calls
    run as they are, and the logger "ceit_kernels" says why, where a module or a parameter has a hook, where inputs are
    not all on one GPU or are no tensors, numbers or words, where a function of ``torch.nn.functional`` was replaced,
    and where a compiler, a mode, a transform or another capture sees the call. What
    Python code does beyond that, such as to branch by a global variable, happens at the capture alone.

    Args:
        model: any module; wrap it in DistributedDataParallel after this, not before.

    Returns:
        The module. Results and gradients are new tensors; those of a graph that is not differentiable a second time.

    Raises:
        ValueError: the model is sharded or already distributed.
        RuntimeError: at a capture: the call waits for the GPU, as ``.item()`` does, or changes its input in place. In
            backward: another call of the kind came first, which took the memory.
    """
    for module in model.modules():
        if any(name in _DISTRIBUTED for name in (c.__name__ for c in type(module).__mro__)):
            raise ValueError(
                f"model: expected a model that no process shares yet, got {type(module).__name__}: graph the model, "
                "then wrap it in DistributedDataParallel; sharded weights have no address that a graph could hold"
            )
    return Graphed(model)


_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class Graphed(nn.Module):
    """What ``graphed`` returns.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._forget()

    def _forget(self) -> None:
        self._known: list[tuple[_State, Graphs]] = []
        self._told: set[str] = set()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model's ``forward`` returns."""
        reason = inputs_reason(arguments, options)
        if reason is None:
            state, graphs = self._present()
            reason = state.reason()
            if reason is None:
                return graphs(arguments, options, graph_settings(), state.parameters)
        if reason not in self._told and not torch.compiler.is_compiling():
            self._told.add(reason)
            _log.warning("%s runs without a CUDA graph: %s", type(self.model).__name__, reason)
        return self.model(*arguments, **options)

    def _present(self) -> tuple[_State, Graphs]:
        """The state that the model is in, and its graphs."""
        found = next((known for known in self._known if known[0].lasts()), None)
        if found is None:
            found = _State(self.model), Graphs(self.model)
            self._known = [found, *self._known[: _STATES - 1]]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_known", "_told")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


def graph_settings() -> tuple[Any, ...]:
    """What is set in the process and decides what a call launches."""
    cuda, cudnn = torch.backends.cuda, cast("Any", torch.backends.cudnn)
    return (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        torch.are_deterministic_algorithms_enabled(),
        (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        *map(current_backend, OPERATORS),
    )


class _State:
    """All that a model's modules hold: every object itself, and where the tensors are.

    Attributes:
        parameters: those that want gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._dicts = [module.__dict__ for module in self._modules]
        self._dicts += [held[name] for held in self._dicts for name in ("_parameters", "_buffers", "_modules")]
        self._hooks = [held[name] for held in self._dicts[: len(self._modules)] for name in _HOOKS]
        self._tensors = [*model.parameters(), *model.buffers()]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._synchronised = [m for m in self._modules if isinstance(m, (nn.SyncBatchNorm, SyncBatchNorm2d))]
        kinds = dict.fromkeys(map(type, self._modules))
        kinds.update(dict.fromkeys(getattr(kind, "plain_class", kind) for kind in kinds))
        self._methods = [(kind, name) for kind in kinds for name in methods_of(kind)]
        self._objects, self._facts = list(self._present()), self._present_facts()
        self._sizes = list(map(len, self._dicts))

    def _present(self) -> Iterator[Any]:
        methods = starmap(getattr, self._methods)
        return chain(map(type, self._modules), methods, *map(methodcaller("values"), self._dicts))

    def _present_facts(self) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in self._tensors]

    def lasts(self) -> bool:
        """Whether nothing has changed."""
        return (
            all(map(is_, self._objects, self._present()))
            and self._sizes == list(map(len, self._dicts))
            and self._facts == self._present_facts()
        )

    def reason(self) -> str | None:
        """Why calls run as they are, if they do."""
        if any(self._hooks) or _has_any_global_hook():
            return "a module has a hook"
        if any(p._backward_hooks for p in self.parameters):
            return "a parameter has a hook"
        if self._synchronised and torch.distributed.is_initialized():
            return "norms exchange statistics with other processes"
        return None


def inputs_reason(arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Why a call with these inputs runs as it is, if it does."""
    if torch.compiler.is_compiling():
        return "a compiler sees the call"
    leaves = tree_leaves((arguments, options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))), None)
    if strange is not None:
        return f"graphs are for tensors, numbers and words, and it is called with a {type(strange).__name__}"
    if not tensors or not all(t.is_cuda for t in tensors) or len({t.device for t in tensors}) > 1:
        return "its inputs are not all on one GPU"
    if not all(map(is_eager, tensors)):
        return "a mode, a transform or a class of tensors sees the call"
    return functions_reason() or ("another capture sees the call" if is_capturing() else None)
