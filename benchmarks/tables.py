"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .harness.measure import Result


def format_table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows, the first of them the heading, as aligned columns or in Markdown."""
    if markdown:
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def result_rows(result: Result) -> list[list[str]]:
    """The implementations of a workload: time, ratio with its interval, rates, memory, backends or the reason."""
    rows = [["implementation", "ms", "plain / this", "99% interval", "GB/s", "TFLOP/s", "peak MB", "saved MB", "note"]]
    for entry in result.entries:
        if entry.median is None:
            rows.append([entry.implementation, *["-"] * 7, f"{entry.status}: {entry.reason}"])
            continue
        rates = result.compulsory_bytes / entry.median / 1e9, result.flops / entry.median / 1e12
        memory = ("-" if size is None else f"{size / 1e6:,.1f}" for size in (entry.peak_bytes, entry.saved_bytes))
        backends = ", ".join(f"{operator} by {by['backend']}" for operator, by in entry.backends.items())
        time = [f"{1e3 * entry.median:,.2f}", *entry.ratio.cells()]
        rows.append([entry.implementation, *time, f"{rates[0]:,.1f}", f"{rates[1]:,.3f}", *memory, backends])
    return rows
