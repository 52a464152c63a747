"""CUDA graphs of a module's calls: what a call launches is captured once for each kind of call, then replayed.

PyTorch's ``torch.cuda.make_graphed_callables`` captures one kind of call, ahead of time. Its warm-up changes running
statistics and random numbers, hooks of parameters run twice, memory that another thread asks for ends a capture, and
nothing notices that a second forward overwrote what the first one kept for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Graphs", "captured", "on_side_stream"]

# A call with gradients tunes and compiles in its backward too, and libraries decide at the second or third.
_FIRST_CALLS = {False: 1, True: 3}


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Run a block on a stream of its own, as PyTorch wants it ahead of a capture, in order with the current one."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def captured(function: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what a function launches, none of which runs before it is replayed, and what the function returned.

    Args:
        function: has run before, so that all is compiled, tuned and allocated that is kept.
        pool: of ``torch.cuda.graph_pool_handle``, for graphs that are always replayed in the order of their captures.

    Raises:
        RuntimeError: it waits for the GPU, or does something else that no graph can hold.
    """
    graph = torch.cuda.CUDAGraph()
    # A cast that autocast has kept would not be part of the graph, and one that it keeps now has no values yet.
    torch.clear_autocast_cache()
    try:
        # Other threads, such as a loader's that pins memory, may go on.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            return graph, function()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"the call cannot be captured in a CUDA graph: {reason}") from error
    finally:
        torch.clear_autocast_cache()


class Graphs:
    """The graphs of a module, one for each kind of call; the first calls of a kind run as they are, to warm up.

    Args:
        module: what is called.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._calls: dict[Any, _Call] = {}

    def __len__(self) -> int:
        """How many graphed calls there are."""
        return sum(call.graph is not None for call in self._calls.values())

    def __call__(
        self, arguments: tuple[Any, ...], options: dict[str, Any], settings: Any, parameters: Sequence[Tensor] = ()
    ) -> Any:
        """What the module returns, in new tensors.

        Args:
            arguments, options: of the call, every tensor of them on one GPU, what else is among them hashable.
            settings: hashable; calls are of one kind if it is equal, and so are the sizes and types of the inputs.
            parameters: of the module, that want gradients; always the same ones.
        """
        leaves, structure = tree_flatten((arguments, options))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        trained = torch.is_grad_enabled() and (bool(parameters) or any(t.requires_grad for t in tensors))
        facts = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
        others = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        kind = trained, settings, str(structure), facts, others

        def run(inputs: Sequence[Tensor]) -> Any:
            for i, x in zip(places, inputs, strict=True):
                leaves[i] = x
            arguments, options = tree_unflatten(leaves, structure)
            return self._module(*arguments, **options)

        call = self._calls.setdefault(kind, _Call(_FIRST_CALLS[trained]))
        with torch.cuda.device(tensors[0].device):
            if call.first_calls:
                call.first_calls -= 1
                with on_side_stream():
                    return run(tensors)
            if call.graph is None:
                call.graph = _Training(run, tensors, parameters) if trained else _Inference(run, tensors)
            return call.graph(tensors, parameters)


class _Call:
    """A kind of call: its graph, and how many calls run as they are before there is one."""

    def __init__(self, first_calls: int) -> None:
        self.first_calls = first_calls
        self.graph: _Inference | _Training | None = None


class _Static:
    """Where a captured call has its inputs and its results."""

    def __init__(self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], pool: Any = None) -> None:
        self.inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        versions = [x._version for x in self.inputs]
        self._graph, results = captured(lambda: run(self.inputs), pool)
        if versions != [x._version for x in self.inputs]:
            raise RuntimeError("the call cannot be captured in a CUDA graph: it changes its input in place")
        leaves, self._structure = tree_flatten(results)
        self.tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._others = [None if isinstance(x, Tensor) else (x,) for x in leaves]

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors among the results, for other inputs."""
        with torch.no_grad():
            torch._foreach_copy_(self.inputs, list(tensors))
            self._graph.replay()
            return tuple([x.clone() for x in self.tensors])

    def results(self, tensors: Sequence[Tensor]) -> Any:
        """The results that have these tensors."""
        found = iter(tensors)
        return tree_unflatten([next(found) if x is None else x[0] for x in self._others], self._structure)


class _Inference:
    """A captured call without gradients."""

    def __init__(self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> None:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._static = _Static(run, tensors)

    def __call__(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
        return self._static.results(self._static.replay(tensors))


class _Training:
    """A captured call and its captured backward, in one pool of memory."""

    def __init__(
        self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._static = static = _Static(run, tensors, pool)
        every = [*static.inputs, *parameters]
        sources, results = ([t for t in some if t.requires_grad] for some in (every, static.tensors))
        self.differentiable = [x.requires_grad for x in static.tensors]
        self._grads_out = [torch.empty_like(x) for x in results]

        def backward() -> Sequence[Tensor | None]:
            return torch.autograd.grad(results, sources, self._grads_out, allow_unused=True) if results else ()

        with torch.autocast("cuda", enabled=False):
            self._backward, grads = captured(backward, pool)
        found = iter(grads)
        self._grads = [next(found, None) if t.requires_grad else None for t in every]
        static.tensors = [x.detach() for x in static.tensors]
        self._calls = 0
        self._versions: list[int] | None = None  # of the parameters, while the last call's backward may run

    def __call__(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
        return self._static.results(_Replay.apply(self, len(tensors), *tensors, *parameters))

    def forward(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[int, tuple[Tensor, ...]]:
        """The number of the call, and its results."""
        self._calls += 1
        self._parameters, self._versions = parameters, [p._version for p in parameters]
        return self._calls, self._static.replay(tensors)

    def backward(self, call: int, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the inputs and the parameters, from those of the results of a call.

        Raises:
            RuntimeError: another call, an earlier backward or a new value of a parameter stands between the two.
        """
        if call != self._calls or self._versions is None:
            raise RuntimeError(
                "a graphed module keeps what backward needs of its last call alone, and once: expected backward ahead "
                "of the next call with inputs of this kind"
            )
        if self._versions != [p._version for p in self._parameters]:
            raise RuntimeError("a graphed module: expected backward ahead of changes to its parameters")
        self._versions = None
        given = [grad for grad, wanted in zip(grads, self.differentiable, strict=True) if wanted]
        torch._foreach_copy_(self._grads_out, given)
        self._backward.replay()
        found = [grad for grad in self._grads if grad is not None]
        copies = [torch.empty_like(grad) for grad in found]
        torch._foreach_copy_(copies, found)
        rest = iter(copies)
        return [None if grad is None else next(rest) for grad in self._grads]


class _Replay(torch.autograd.Function):
    """A captured call in the place of its own operators."""

    @staticmethod
    def forward(ctx: Any, graph: _Training, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.call, results = graph.forward(tensors[:inputs], tensors[inputs:])
        ctx.mark_non_differentiable(*[x for x, wanted in zip(results, graph.differentiable, strict=True) if not wanted])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *ctx.graph.backward(ctx.call, grads)
