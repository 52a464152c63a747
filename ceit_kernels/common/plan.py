"""Launch plans: what a call on a GPU does, kept as a list, so that the next such call is a loop over ready launches.

Preparing a launch and finding its compiled kernel takes Python longer than many a kernel runs. So the first call of
each kind is taken down while it runs: its launches (``launch.launch``) and buffers (``buffer``), each with the places
that its arguments come from. A plan holds numbers and compiled kernels, and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .launch import is_recording, this_thread
from .tuning import is_capturing, is_tuning

__all__ = ["buffer", "compute", "planned", "without_plan"]

# Picks the arguments of a step, or the results, from the values of a call.
Picker = Callable[[list[Any]], Any]

_LIMIT = 1024  # plans that are kept, of which each takes some kilobytes

# None for a kind of call that cannot be replayed.
_plans: dict[Hashable, _Plan | None] = {}


def planned(tensors: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function's calls run by plans.

    It makes tensors by ``compute`` and ``buffer`` alone, launches by ``launch.launch``, and returns tensors that it
    made, one or several. What it does may depend on nothing but the device, on shape, dtype and alignment of each
    tensor, the other arguments, whether tiles are tuned, and PyTorch's ``fp32_precision`` of matmuls.

    Args:
        tensors: how many of its arguments, from the first, are tensors. It gets them contiguous; all but the first may
            be None. The others must be hashable.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*arguments: Any) -> Any:
            inputs = [t if t is None or t.is_contiguous() else t.contiguous() for t in arguments[:tensors]]
            settings = arguments[tensors:]
            if is_recording():
                return run(*inputs, *settings)
            device = inputs[0].device
            facts = tuple([None if t is None else (t.shape, t.dtype, t.data_ptr() % 16 == 0) for t in inputs])
            key = run, settings, device, facts, is_tuning(), torch.backends.cuda.matmul.fp32_precision
            with torch.cuda.device(device) if inputs[0].is_cuda else nullcontext():
                plan = _plans.get(key, _UNKNOWN)
                if plan is _UNKNOWN:
                    return _first_call(key, run, inputs, settings)
                return run(*inputs, *settings) if plan is None else plan(inputs)

        return call

    return decorate


def _first_call(key: Hashable, run: Callable[..., Any], inputs: list[Any], settings: tuple[Any, ...]) -> Any:
    # Each input as an object of its own: two that are one tensor now need not be so in the next call.
    own = [None if tensor is None else tensor.detach() for tensor in inputs]
    tape = _Tape(own)
    with _taking_down(tape):
        results = run(*own, *settings)
    if not (is_tuning() and is_capturing()):  # or it would keep to tiles that were not timed
        while len(_plans) >= _LIMIT:
            _plans.pop(next(iter(_plans)), None)
        _plans[key] = tape.plan(results)
    return results


@contextmanager
def _taking_down(tape: _Tape | None) -> Iterator[None]:
    outer, this_thread.tape = this_thread.tape, tape
    try:
        yield
    finally:
        this_thread.tape = outer


def without_plan() -> AbstractContextManager[None]:
    """A block that a plan leaves out, such as the timing of candidates."""
    return _taking_down(None)


def compute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What a function of tensors and constants returns, as a step of the plan that is being taken down, if any."""
    result = function(*arguments)
    if this_thread.tape is not None:
        this_thread.tape.add(function, arguments, result)
    return result


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is not filled, as a step likewise."""
    return compute(_empty, tuple(shape), dtype, device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class _Tape:
    """Takes down the steps of a call. A value of the call is an input, the result of a step, or a constant."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self._count = len(inputs)
        self._places = {id(tensor): i for i, tensor in enumerate(inputs) if tensor is not None}
        # Alive until the end, or the address of one might become that of another.
        self._tensors: list[Any] = []
        self._constants: list[Any] = []
        self._places_of_constants: dict[Hashable, int] = {}
        self._steps: list[tuple[Callable[..., Any], Picker]] = []
        self._complete = True

    def add(self, function: Callable[..., Any], arguments: Sequence[Any], result: Any) -> None:
        self._steps.append((function, self._picker(arguments)))
        if result is not None:
            self._places[id(result)] = self._count + len(self._steps) - 1
            self._tensors.append(result)

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Any
    ) -> None:
        """Add a launch by what it returned: the compiled kernel, or None where it is interpreted."""
        ready = partial(kernel[grid], **options) if compiled is None else compiled[(*grid, 1, 1)[:3]]
        self.add(ready, arguments, None)

    def plan(self, results: Any) -> _Plan | None:
        """The plan; None if a step or a result took a tensor from elsewhere, which another call may not have."""
        pick = itemgetter(self._place(results)) if isinstance(results, Tensor) else self._picker(results)
        if not self._complete:
            return None
        return _Plan(self._steps, [None] * len(self._steps) + self._constants[::-1], pick)

    def _picker(self, arguments: Sequence[Any]) -> Picker:
        places = [self._place(argument) for argument in arguments]
        if len(places) > 1:
            return itemgetter(*places)
        return (lambda values: (values[places[0]],)) if places else (lambda values: ())

    def _place(self, argument: Any) -> int:
        if isinstance(argument, Tensor):
            self._complete &= id(argument) in self._places
            return self._places.get(id(argument), 0)
        # From the end on, since the steps are not all known; 1, 1.0 and True are equal.
        place = self._places_of_constants.setdefault((type(argument), argument), ~len(self._constants))
        if ~place == len(self._constants):
            self._constants.append(argument)
        return place


class _Plan:
    """The steps of a call.

    Args:
        steps: each a function and what picks its arguments from the values: the inputs, the results of the steps in
            order, and the constants.
        template: the values behind the inputs, without results.
        results: picks the call's results.
    """

    def __init__(self, steps: list[tuple[Callable[..., Any], Picker]], template: list[Any], results: Picker) -> None:
        self._steps, self._template, self._results = steps, template, results

    def __call__(self, inputs: list[Any]) -> Any:
        values = inputs + self._template
        for place, (function, pick) in enumerate(self._steps, len(inputs)):
            values[place] = function(*pick(values))
        return self._results(values)


_UNKNOWN = object()
