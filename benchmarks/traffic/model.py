"""The bytes of device memory that a whole model moves, plain, compiled and fused, counted without a GPU."""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn

from ceit.registry import create_model, default_cfgs, list_models
from ceit.runtime.options import UsageError, add_options, check, option
from ceit_kernels import use_backend

from . import Call, CompiledTrafficError, Kernel, count_call, count_compiled, format_table

PHASES = ("inference", "training step")

_traffic = partial(option, group="traffic")


@dataclasses.dataclass(kw_only=True)
class TrafficOptions:
    """Options of `traffic`."""

    model: str = _traffic("ceit_small_patch16_224", "name of the model", choices=list_models())
    batch_size: int = _traffic(256, "images", at_least=1)
    dtype: str = _traffic("bfloat16", "of images and weights", choices=("bfloat16", "float16", "float32"))
    compiled: bool = _traffic(False, "also count what torch.compile makes of the plain model, which takes minutes")
    kernels: bool = _traffic(False, "also list what the bytes are spent on, kernel by kernel")
    markdown: bool = _traffic(False, "print Markdown")


def traffic(options: TrafficOptions) -> None:
    """Print launches and gigabytes of a forward call at inference, and of forward and backward of a training step.

    The optimizer is left out. What is counted, and how, is said at `benchmarks.traffic.count_call`; the fused
    operators count as they would run on a GPU, and by plain PyTorch where they have no kernels.

    Raises:
        UsageError: an option cannot be used.
    """
    check(options)
    kinds = ("plain", "torch.compile", "fused") if options.compiled else ("plain", "fused")
    rows = [["phase", "operators", "launches", "GB", "by fused kernels", "in the stem", "saved for backward"]]
    lists = []
    for phase in PHASES:
        for kind in kinds:
            call, stem = (count_model(options, kind, phase, stem=stem) for stem in (False, True))
            kernels = call.forward + call.backward
            fused = _gigabytes(kernel for kernel in kernels if kernel.fused)
            saved = "-" if call.saved_bytes is None else f"{call.saved_bytes / 1e9:.1f}"
            sizes = _gigabytes(kernels), fused, _gigabytes(stem.forward + stem.backward), saved
            rows.append([phase, kind, str(len(kernels)), *sizes])
            lists.append((f"{phase}, {kind}", _by_name(kernels)))
    print(format_table(rows, markdown=options.markdown))
    for title, table in lists if options.kernels else ():
        print(f"\n{title}\n\n{format_table(table, markdown=options.markdown)}")


def count_model(options: TrafficOptions, kind: str, phase: str, *, stem: bool = False) -> Call:
    """Count a call of a model.

    Args:
        options: which model, batch size and dtype.
        kind: "plain", "fused", or "torch.compile", which is given the plain model.
        phase: "inference" or "training step".
        stem: count the image-to-tokens module alone.

    Raises:
        UsageError: the kernels of this version's torch.compile cannot be counted.
    """

    def make() -> nn.Module:
        model = create_model(options.model, fused=kind == "fused")
        return model.i2t if stem else model

    shape = options.batch_size, *default_cfgs[options.model].default.input_size
    count = count_compiled if kind == "torch.compile" else count_call
    training = phase == "training step"
    try:
        with use_backend("auto"):
            return count(make, shape, getattr(torch, options.dtype), training=training, input_gradient=False)
    except CompiledTrafficError as error:
        raise UsageError(f"--compiled: {error}") from error


def _gigabytes(kernels: Iterable[Kernel]) -> str:
    return f"{sum(kernel.bytes for kernel in kernels) / 1e9:.1f}"


def _by_name(kernels: Iterable[Kernel]) -> list[list[str]]:
    """Kernels of one name together, those that move most first."""
    launches, moved = Counter(), Counter()
    for kernel in kernels:
        launches[kernel.name] += 1
        moved[kernel.name] += kernel.bytes
    rows = [[name, str(launches[name]), f"{size / 1e9:.2f}"] for name, size in moved.most_common()]
    return [["kernel", "launches", "GB"], *rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic.model", description="Count a whole model.")
    add_options(parser, TrafficOptions)
    try:
        traffic(TrafficOptions(**vars(parser.parse_args(arguments))))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
