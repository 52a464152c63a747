"""The tables that are printed: counted traffic, and the times that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .cases import Case, make_cases
from .counting import Call, Kernel
from .modelled import modelled_seconds

__all__ = ["PHASES", "Figures", "compiled_figures", "format_table", "times_table", "traffic_table"]

PHASES = ("inference", "training forward", "training backward")
MODELS = {"T": 192, "S": 384, "B": 768}  # channels
BATCHES = (1, 64, 256)

# Kernels and bytes of an operator's phase.
Figures = Mapping[tuple[str, str], tuple[int, int]]


def traffic_table(cases: Iterable[Case], compiled: Figures) -> list[list[str]]:
    """Launches, megabytes and passes (u) of each operator and phase, fused and by ``torch.compile``.

    Args:
        cases: the calls to count.
        compiled: figures of ``torch.compile``, as far as there are any.
    """
    rows = [["operator", "phase", "launches", "MB", "u", "torch.compile: kernels", "MB", "u"]]
    for case in cases:
        unit_bytes = case.unit * case.dtype.itemsize
        inference, training = case.count_fused(training=False), case.count_fused(training=True)
        for phase, kernels in zip(PHASES, (inference.forward, training.forward, training.backward), strict=True):
            count, moved = compiled.get((case.operator, phase), (None, None))
            theirs = ["-"] * 3 if count is None else [str(count), *_sizes(moved, unit_bytes)]
            rows.append([case.operator, phase, *_ours(kernels, unit_bytes), *theirs])
        if _is_fused(training.forward):
            rows.append(
                [case.operator, "saved for backward", "", *_sizes(training.saved_bytes, unit_bytes), "", "", ""]
            )
    return rows


def compiled_figures(cases: Iterable[Case]) -> Figures:
    """What ``torch.compile`` launches and moves for each operator and phase."""
    figures = {}
    for case in cases:
        inference, training = case.count_compiled(training=False), case.count_compiled(training=True)
        for phase, kernels in zip(PHASES, (inference.forward, training.forward, training.backward), strict=True):
            figures[case.operator, phase] = len(kernels), sum(kernel.bytes for kernel in kernels)
    return figures


def times_table(image_size: int, dtype: torch.dtype, *, compiled: bool) -> list[list[str]]:
    """Modelled microseconds of LeFF on an H100 for each model and batch, fused and, if asked, by ``torch.compile``."""
    rows = [["LeFF", "batch", "phase", "fused, us", "torch.compile, us", "ratio"]]
    for model, channels in MODELS.items():
        for batch in BATCHES:
            leff = make_cases(batch, channels, image_size, dtype)[0]
            for training, phase in enumerate(("inference", "training step")):
                ours = leff.count_fused(training=bool(training))
                theirs = leff.count_compiled(training=bool(training)) if compiled else None
                rows.append([model, str(batch), phase, *_times(ours, theirs)])
    return rows


def format_table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows, the first of them the heading, as aligned columns or in Markdown."""
    if markdown:
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _is_fused(kernels: Iterable[Kernel]) -> bool:
    return any(kernel.fused for kernel in kernels)


def _ours(kernels: Sequence[Kernel], unit_bytes: int) -> list[str]:
    if not _is_fused(kernels):
        return ["no kernels yet", "-", "-"]
    return [str(len(kernels)), *_sizes(sum(kernel.bytes for kernel in kernels), unit_bytes)]


def _sizes(moved: int, unit_bytes: int) -> list[str]:
    return [f"{moved / 1e6:,.1f}", f"{moved / unit_bytes:.1f}"]


def _times(ours: Call, theirs: Call | None) -> list[str]:
    fused = modelled_seconds(ours.forward + ours.backward) if _is_fused(ours.forward) else None
    compiled = None if theirs is None else modelled_seconds(theirs.forward + theirs.backward)
    ratio = "-" if fused is None or compiled is None else f"{compiled / fused:.1f}"
    return [
        "no kernels yet" if fused is None else f"{1e6 * fused:,.0f}",
        "-" if compiled is None else f"{1e6 * compiled:,.0f}",
        ratio,
    ]
