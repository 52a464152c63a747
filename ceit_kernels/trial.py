"""``python -m ceit_kernels try``: what fusing a model changes, in numbers and in time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from pkgutil import resolve_name
from statistics import median
from textwrap import shorten
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .freeze import freeze
from .fuse import fuse

__all__ = ["Checked", "Result", "TrialError", "check", "image_size_of", "make_model", "measure"]

# What a difference in float64 may be, relative to the largest number of its kind.
_TOLERANCE = 1e-9


class TrialError(Exception):
    """A model cannot be made or called; the text says what to give instead."""


@dataclass(frozen=True)
class Checked:
    """How far a fused model is from the plain one.

    Attributes:
        name: what was compared.
        difference: the largest, relative to the largest number; in float32 the error against float64 likewise.
        allowed: what it may be.
    """

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Result:
    """What an implementation takes.

    Attributes:
        name: "plain", "torch.compile", "fused" or "frozen".
        inference_ms: median of a call without gradients.
        inference_bytes: allocated at the peak of it, beyond what was there before.
        training_ms: median of a forward and a backward pass; None where it does not train.
        training_bytes: allocated at the peak of these.
        difference: of the result from plain PyTorch's, relative to its largest number.
    """

    name: str
    inference_ms: float
    inference_bytes: int
    training_ms: float | None
    training_bytes: int | None
    difference: float


def make_model(name: str) -> nn.Module:
    """A model with random weights.

    Args:
        name: of timm; ``hf:NAME`` of a model type of transformers ("hf:segformer") or of a folder with a config.json;
            or ``module:function`` of a function of your own that returns a model.

    Raises:
        TrialError: there is no such model.
    """
    library, colon, rest = name.partition(":")
    try:
        if library == "hf" and colon:
            transformers = import_module("transformers")
            local = (Path(rest) / "config.json").exists()
            config = transformers.AutoConfig
            config = config.from_pretrained(rest, local_files_only=True) if local else config.for_model(rest)
            return transformers.AutoModel.from_config(config)
        made = resolve_name(name)() if colon else import_module("timm").create_model(name)
    except (ImportError, AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise TrialError(f"MODEL: {name!r} cannot be made: {shorten(str(error), 200)}") from error
    if not isinstance(made, nn.Module):
        raise TrialError(f"MODEL: expected {name!r} to give a torch.nn.Module, got {type(made).__name__}")
    return made


def image_size_of(model: nn.Module) -> int:
    """The side of the images that a model of timm or transformers is made for; 224 where it does not say."""
    timm_config, config = getattr(model, "pretrained_cfg", None), getattr(model, "config", None)
    size = timm_config["input_size"][-1] if timm_config else getattr(config, "image_size", None) or 224
    return size if isinstance(size, int) else size[-1]


def check(model: nn.Module, x: Tensor) -> list[Checked]:
    """Compare a fused copy of a model with it, outputs and gradients: in float64, and in float32 by their errors.

    The error rule: against float64, a fused model may be at most twice as wrong as the plain one in the same dtype.
    """
    found = []
    for mode in ("evaluation", "training"):
        exact = copy.deepcopy(model).double().train(mode == "training")
        expected, fused = _step(exact, x.double()), _step(fuse(copy.deepcopy(exact)), x.double())
        for kind, truth in expected.items():
            found.append(Checked(f"{kind}, {mode}, float64", _relative(fused[kind], truth), _TOLERANCE))
    single = copy.deepcopy(model).float().eval()  # in training other numbers would be drawn than in float64
    exact = _step(copy.deepcopy(single).double(), x.double())
    plain, fused = _step(single, x), _step(fuse(copy.deepcopy(single)), x)
    for kind, truth in exact.items():
        allowed = 2 * _relative(plain[kind], truth) + torch.finfo(torch.float32).eps
        found.append(Checked(f"{kind}, evaluation, float32", _relative(fused[kind], truth), allowed))
    return found


def measure(model: nn.Module, x: Tensor, repeats: int, compiled: bool) -> list[Result]:
    """Time a model in turns with its fused and frozen copies, and with ``torch.compile`` of it if wanted."""
    models: dict[str, nn.Module] = {"plain": model}
    if compiled:
        models["torch.compile"] = cast("nn.Module", torch.compile(copy.deepcopy(model)))
    models |= {"fused": fuse(copy.deepcopy(model)), "frozen": freeze(model)}
    evaluations = {name: partial(_evaluate, each, x) for name, each in models.items()}
    outputs = {name: call() for name, call in evaluations.items()}
    inference = _times(evaluations, repeats, x)
    inference_bytes = {name: _peak_bytes(call, x) for name, call in evaluations.items()}
    steps = {name: partial(_step, each.train(), x) for name, each in models.items() if name != "frozen"}
    training = _times(steps, repeats, x)
    return [
        Result(
            name,
            inference[name],
            inference_bytes[name],
            training.get(name),
            _peak_bytes(steps[name], x) if name in steps else None,
            _relative([out], [outputs["plain"].double()]),
        )
        for name, out in outputs.items()
    ]


def _evaluate(model: Any, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return _first_tensor(model(x))


def _step(model: Any, x: Tensor) -> dict[str, list[Tensor]]:
    """The output, and the gradients of the input and of all parameters."""
    torch.manual_seed(0)  # dropout and drop path draw the same
    x = x.detach().requires_grad_()
    out = _first_tensor(model(x))
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    return {"output": [out.detach()], "gradients": [g for g in gradients if g is not None]}


def _first_tensor(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = (
            out.to_tuple()[0]
            if hasattr(out, "to_tuple")
            else next(iter(out.values() if isinstance(out, dict) else out))
        )
    return out


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number that is expected, in float64."""
    scale = max(value.abs().max().item() for value in expected)
    return max((a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True)) / scale


def _times(calls: Mapping[str, Callable[[], Any]], repeats: int, x: Tensor) -> dict[str, float]:
    """Median milliseconds of each call, in turns after a first call of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            _synchronize(x)
            start = time.perf_counter()
            call()
            _synchronize(x)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found) for name, found in times.items()}


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _peak_bytes(call: Callable[[], Any], x: Tensor) -> int:
    """What PyTorch allocates during a call at its peak; on the CPU summed from a profile."""
    if x.is_cuda:
        _synchronize(x)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        call()
        _synchronize(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))
