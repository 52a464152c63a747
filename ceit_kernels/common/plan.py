"""Launch plans: what a call on a GPU does, kept as a list, so that the next such call is a loop over ready launches.

Preparing a launch and finding its compiled kernel takes Python longer than many a kernel runs. So the first call of
each kind is taken down while it runs: its launches (``launch.launch``) and buffers (``buffer``), each with the places
that its arguments come from. A plan holds numbers and compiled kernels, and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from .launch import has_launch_hooks, is_recording, this_thread
from .stopwatch import is_capturing
from .tuning import is_tuning

__all__ = ["buffer", "buffers_like", "compute", "planned", "without_plan"]

# Picks the arguments of a step, or the results, from the values of a call.
Picker = Callable[[list[Any]], Any]
_Step = tuple[Callable[..., Any], Picker, int]

_LIMIT = 1024  # plans that are kept, of which each takes some kilobytes
_LARGE = 2**25  # bytes of a buffer that is no piece of another
_ALIGNED = 128  # numbers of a piece are a multiple, so that all start as a buffer of their own would
_ALIGNED_RESULT = 16  # likewise where the piece is a result, so that kernels load and store 16 bytes at a time

_HERE = nullcontext()

Made = TypeVar("Made", bound=Tensor | None)

# None for a kind of call that cannot be replayed.
_plans: dict[Hashable, _Plan | None] = {}


def planned(tensors: int, shaped: Sequence[int] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function's calls run by plans.

    It makes tensors by ``compute`` and ``buffer`` alone, launches by ``launch.launch``, and returns tensors that it
    made, one or several. What it does may depend on nothing but the device, on shape, dtype and alignment of each
    tensor, the other arguments, whether tiles are tuned, and PyTorch's ``fp32_precision`` of matmuls.

    Args:
        tensors: how many of its arguments, from the first, are tensors. It gets them contiguous; all but the first may
            be None. The others must be hashable.
        shaped: places of those whose shapes, with the other arguments, say the shapes of all; by default all.
    """
    shaped = tuple(range(tensors) if shaped is None else shaped)

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*arguments: Any) -> Any:
            inputs: list[Any] = []
            settings, dtypes, bits, recording = arguments[tensors:], [], 0, is_recording()
            for tensor in arguments[:tensors]:
                if tensor is None:
                    dtypes.append(None)
                else:
                    if not tensor.is_contiguous():
                        tensor = tensor.contiguous()
                    dtypes.append(tensor.dtype)
                    bits |= 0 if recording else tensor.data_ptr()
                inputs.append(tensor)
            if recording:
                return run(*inputs, *settings)
            first = inputs[0]
            shapes = tuple([None if inputs[i] is None else inputs[i].shape for i in shaped])
            # Of 16 bytes, which the compiler makes use of.
            aligned = bits % 16 == 0 or tuple([t is None or t.data_ptr() % 16 == 0 for t in inputs])
            facts = first.device, shapes, tuple(dtypes), aligned
            # The precision as torch.backends.cuda.matmul.fp32_precision has it, in a tenth of the time.
            key = run, settings, facts, is_tuning(), torch._C._get_fp32_precision_getter("cuda", "matmul")
            with _on_device_of(first):
                plan = _plans.get(key, _UNKNOWN)
                if plan is _UNKNOWN:
                    return _first_call(key, run, inputs, settings)
                return run(*inputs, *settings) if plan is None or has_launch_hooks() else plan(inputs)

        return call

    return decorate


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block whose launches go to a tensor's device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


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


def compute(function: Callable[..., Made], *arguments: Any) -> Made:
    """What a function of tensors and constants returns, as a step of the plan that is being taken down, if any."""
    result = function(*arguments)
    if this_thread.tape is not None:
        this_thread.tape.add(function, arguments, result)
    return result


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device, shares: bool = False) -> Tensor:
    """A tensor that is not filled, as part of the plan likewise; one that shares may be a piece of a larger one."""
    result = torch.empty(shape, dtype=dtype, device=device)
    if this_thread.tape is not None:
        this_thread.tape.add_buffer(result, shares)
    return result


def buffers_like(tensors: Sequence[Tensor | None], needs: Sequence[bool], shares: bool = False) -> list[Tensor | None]:
    """Buffers of the shapes and dtypes of tensors, such as for their gradients; None for those that are not needed."""
    return [
        buffer(tensor.shape, tensor.dtype, tensor.device, shares) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]


class _Tape:
    """Takes down a call. A value of the call is an input, the stream, a buffer, the result of a step, or a constant."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self._places = {id(tensor): i for i, tensor in enumerate(inputs) if tensor is not None}
        self._stream = len(inputs)
        self._count = self._stream + 1  # of places
        # Alive until the end, or the address of one might become that of another.
        self._buffers: list[Tensor] = []
        self._results: list[Any] = []
        self._constants: list[Any] = []
        self._places_of_constants: dict[Hashable, int] = {}
        self._steps: list[_Step] = []
        self._shaped: set[int] = set()  # of what functions take, to which shapes mean something
        self._sharing: set[int] = set()  # of what may be a piece even if it is a result
        self._complete, self._on_gpu = True, False

    def add_buffer(self, tensor: Tensor, shares: bool) -> None:
        """Add a tensor that is not filled."""
        self._buffers.append(tensor)
        place = self._places[id(tensor)] = self._next()
        if shares and tensor.dim() == 1 and tensor.numel() % _ALIGNED_RESULT == 0:
            self._sharing.add(place)

    def add(self, function: Callable[..., Any], arguments: Sequence[Any], result: Any = None) -> None:
        """Add a step, whose result is a tensor or None."""
        self._shaped |= {self._place(argument) for argument in arguments}
        self._steps.append((function, self._picker(map(self._place, arguments)), self._next()))
        if result is not None:
            self._results.append(result)
            self._places[id(result)] = self._count - 1

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Any
    ) -> None:
        """Add a launch by what it returned: the compiled kernel, or None where it is interpreted."""
        if compiled is None:
            step = partial(kernel[grid], **options), self._picker(map(self._place, arguments)), self._next()
            self._steps.append(step)
            return
        self._on_gpu |= any(isinstance(a, Tensor) and a.is_cuda for a in arguments)
        # As Triton's own launcher calls it, which has no hooks to tell of the launch when a plan is followed.
        places = [
            self._place(a) for a in (*(*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata, None, None, None)
        ]
        places.insert(3, self._stream)
        self._steps.append((compiled.run, self._picker([*places, *map(self._place, arguments)]), self._next()))

    def plan(self, results: Any) -> _Plan | None:
        """The plan; None if a step or a result took a tensor from elsewhere, which another call may not have."""
        returned = [results] if isinstance(results, Tensor) else results
        places = [self._place(result) for result in returned]
        pick = itemgetter(*places) if isinstance(results, Tensor) else self._picker(places)
        if not self._complete:
            return None
        alone, shared = [], {}
        for tensor in self._buffers:
            place, numbers = self._places[id(tensor)], tensor.numel()
            is_result = place in places
            if place in self._shaped or tensor.nbytes > _LARGE or (is_result and place not in self._sharing):
                alone.append((place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
            else:
                numbers = numbers if is_result else -(-numbers // _ALIGNED) * _ALIGNED
                shared.setdefault((tensor.dtype, tensor.device, is_result), []).append((place, numbers))
        pools = [
            ((sum(sizes),), dtype, device, places, list(sizes))
            for (dtype, device, _), pieces in shared.items()
            for places, sizes in [zip(*pieces, strict=True)]
        ]
        template = [None] * (self._count - self._stream) + self._constants[::-1]
        return _Plan(alone, pools, self._steps, template, pick, self._on_gpu)

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    def _picker(self, places: Iterable[int]) -> Picker:
        places = list(places)
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
    """What a call does.

    Args:
        buffers: the place, shape, strides, dtype and device of each tensor that is not filled.
        pools: shape, dtype and device of one, and the places and numbers of elements of the buffers that are pieces of
            it: small ones that are not results, or results that share.
        steps: each a function, what picks its arguments from the values, and its result's place.
        template: the values behind the inputs as far as they are constants.
        results: picks the call's results.
        on_gpu: whether the stream is one of a GPU.
    """

    def __init__(
        self,
        buffers: list[Any],
        pools: list[Any],
        steps: list[_Step],
        template: list[Any],
        results: Picker,
        on_gpu: bool,
    ) -> None:
        self._buffers, self._pools, self._steps = buffers, pools, steps
        self._template, self._results, self._on_gpu = template, results, on_gpu

    def __call__(self, inputs: list[Any]) -> Any:
        values = inputs + self._template
        values[len(inputs)] = torch.cuda.current_stream().cuda_stream if self._on_gpu else 0
        empty = torch.empty_strided  # the quickest
        for place, shape, stride, dtype, device in self._buffers:
            values[place] = empty(shape, stride, dtype=dtype, device=device)
        for shape, dtype, device, places, sizes in self._pools:
            pieces = empty(shape, (1,), dtype=dtype, device=device).split_with_sizes(sizes)
            for place, piece in zip(places, pieces, strict=True):
                values[place] = piece
        for function, pick, place in self._steps:
            values[place] = function(*pick(values))
        return self._results(values)


_UNKNOWN: Any = object()
