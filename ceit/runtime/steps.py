"""Steps of training: as they are, or replayed as CUDA graphs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ceit_kernels.common.graphs import captured, on_side_stream

from .machine import autocast
from .setup import Run
from .sharding import gradients_exchanged

Step = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]

_FIRST_STEPS = 3  # of a kind, which run as they are: they compile, tune and make the optimizer's state


def steps(run: Run) -> Step:
    """What takes a step of a run: `step(images, targets, group, updates)`, with the loss and the logits for a result.

    `group` is the number of batches of an update, and `updates` whether this one is the last of them, behind which the
    gradients are applied.
    """
    # Processes exchange gradients outside of the graphs, which are the model's own then.
    whole = run.options.cuda_graphs and not run.options.compile and not run.place.distributed
    return GraphedSteps(run) if whole else EagerSteps(run)


class EagerSteps:
    """Steps as they are."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, images: Tensor, targets: Tensor, group: int, updates: bool) -> tuple[Tensor, Tensor]:
        """Take a step."""
        results = self._differentiate(images, targets, group, updates)
        if updates:
            self._apply_gradients()
        return results

    def _differentiate(self, images: Tensor, targets: Tensor, group: int, updates: bool) -> tuple[Tensor, Tensor]:
        run = self._run
        # Processes exchange gradients only where an update follows.
        with gradients_exchanged(run.forward, updates):
            with autocast(run.place.device, run.options.amp):
                logits = run.forward(images)
            loss = run.loss(logits.float(), targets)
            run.scaler.scale(loss / group).backward()
        return loss.detach(), logits.detach()

    def _apply_gradients(self) -> None:
        run = self._run
        if run.options.clip_grad is not None:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip_grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()


@dataclasses.dataclass
class _Kind:
    """A kind of step: how many were taken, and its graph with the tensors that it reads and writes.

    `before` and `after` are the parameters' gradients where the captured step begins and ends.
    """

    taken: int = 0
    graph: Any = None
    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    results: tuple[Tensor, ...] = ()
    before: list[Tensor | None] = dataclasses.field(default_factory=list)
    after: list[Tensor | None] = dataclasses.field(default_factory=list)


class GraphedSteps(EagerSteps):
    """Steps each of which is one CUDA graph: forward, loss, backward, and the update where it can be captured.

    It can by Adam and AdamW, which then count and compute their corrections on the GPU (`capturable`), without the
    float16 scaler, which waits for the GPU. The learning rates are tensors while a step is taken.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._kinds: dict[Any, _Kind] = {}
        self._parameters = [p for p in run.model.parameters() if p.requires_grad]
        self._groups = run.optimizer.param_groups
        self._with_update = not run.scaler.is_enabled() and all(group.get("capturable") for group in self._groups)
        device = run.place.device
        self._rates = [torch.zeros((), device=device) for _ in self._groups] if self._with_update else []

    def __call__(self, images: Tensor, targets: Tensor, group: int, updates: bool) -> tuple[Tensor, Tensor]:
        """Take a step."""
        gradients = self._gradients()
        inputs = [images, targets]
        facts = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        kind = self._kinds.setdefault((facts, group, updates, gradients[0] is None), _Kind())
        kind.taken += 1
        with self._rates_as_tensors():
            if kind.graph is None and kind.taken > _FIRST_STEPS:
                kind.inputs, kind.before = [x.clone() for x in inputs], gradients
                static_images, static_targets = kind.inputs
                kind.graph, kind.results = captured(lambda: self._take(static_images, static_targets, group, updates))
                kind.after = self._gradients()
            if kind.graph is None or not all(map(is_, gradients, kind.before)):
                with on_side_stream():
                    loss, logits = self._take(images, targets, group, updates)
            else:
                torch._foreach_copy_(kind.inputs, inputs)
                kind.graph.replay()
                loss, logits = kind.results
                self._set_gradients(kind.after)
        if updates and not self._with_update:
            self._apply_gradients()
        return loss.clone(), logits

    def _take(self, images: Tensor, targets: Tensor, group: int, updates: bool) -> tuple[Tensor, Tensor]:
        results = self._differentiate(images, targets, group, updates)
        if updates and self._with_update:
            self._apply_gradients()
        return results

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self._parameters]

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Let the optimizer find its learning rates in memory: a number would be part of a graph for good."""
        numbers = [group["lr"] for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=False):
            group["lr"] = rate.fill_(group["lr"])
        try:
            yield
        finally:
            for group, number in zip(self._groups, numbers, strict=True):
                group["lr"] = number
