"""The report: Markdown tables, JSON and pictures of what was measured and of what was modelled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .harness.implementations import IMPLEMENTATIONS
from .harness.machine import environment, measure_ceilings
from .harness.measure import Result, result_rows
from .pictures import draw_all
from .results import AXES, Report, scaling_curves
from .session import Session
from .tables import format_table
from .traffic import assumed, model_gpu


def make_report(session: Session, command: str) -> Report:
    """The report of a run, with the ceilings of the machine and the modelled part."""
    dtypes = dict.fromkeys(workload.dtype for workload in session.results)
    return Report(
        command,
        environment(session.device),
        {dtype: measure_ceilings(session.device, getattr(torch, dtype)) for dtype in dtypes},
        list(session.results.values()),
        [workload.name for workload in session.cases if workload not in session.results],
        model_gpu(),
        session.clock.spent,
    )


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, scaling.md and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    report.modelled = report.modelled or model_gpu()
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    pictures = draw_all(report, folder)
    (folder / "report.md").write_text(_report_text(report, pictures))
    if any(result.workload.axis for result in report.results):
        (folder / "scaling.md").write_text(_scaling_text(report))


def _report_text(report: Report, pictures: Mapping[str, str]) -> str:
    """The report in Markdown; `pictures` has file names by title."""
    parts = ["# Benchmarks", f"Made by `{report.command}` in {report.seconds / 60:.0f} minutes.", _environment(report)]
    parts += report.warning()
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    parts.append(f"## Measured on {report.environment['chip']}\n\n{_LEGEND}")
    parts += [_result_text(report, result) for result in report.measured]
    if report.left_out:
        parts.append(f"Left out, because the run's time was used up: {', '.join(report.left_out)}.")
    parts.append(_modelled_text(report.modelled))
    return "\n\n".join(parts) + "\n"


def _result_text(report: Report, result: Result) -> str:
    methods = sorted({entry.method for entry in result.entries if entry.method})
    launches = [f"{e.implementation} {e.launches}" for e in result.entries if e.launches is not None]
    inputs = f", {result.rotating_inputs} inputs in rotation" if result.rotating_inputs > 1 else ""
    facts = f"{max(len(entry.seconds) for entry in result.entries)} rounds{inputs}, {', '.join(methods)}"
    facts += f"; launches: {', '.join(launches)}" if launches else ""
    parts = [
        f"### {result.workload.name}",
        format_table(result_rows(result), markdown=True),
        f"{facts}. Again: `{report.again(result.workload.name)}`",
    ]
    rows = [["kernel", "launches", "us", "bound, us", "MB", "GB/s", "TFLOP/s"]]
    ceilings = report.ceilings[result.workload.dtype]
    for kernel in (kernel for entry in result.entries for kernel in entry.kernels):
        seconds, moved, flops = kernel["seconds"], kernel["bytes"], kernel["flops"]
        bound = max(moved / ceilings["bytes_per_second"], flops / ceilings["flops_per_second"])
        cells = f"{1e6 * seconds:,.1f}", f"{1e6 * bound:,.1f}", f"{moved / 1e6:,.1f}"
        rates = f"{moved / seconds / 1e9:,.0f}", f"{flops / seconds / 1e12:,.1f}"
        rows.append([kernel["name"], str(kernel["launches"]), *cells, *rates])
    if len(rows) > 1:
        said = "Its kernels, profiled; bytes and FLOPs as counted, the bound by them and the ceilings of this machine:"
        parts += [said, format_table(rows, markdown=True)]
    parts += [f"No time for {line}." for entry in result.entries for line in entry.unmatched]
    return "\n\n".join(parts)


_LEGEND = (
    "Medians of rounds in which the implementations take turns. Above 1, plain / this is faster than plain PyTorch. "
    "Outputs, and in training gradients, were compared with plain PyTorch's before a time counted. GB/s are those of "
    "the input, the output and the parameters, which nothing avoids; TFLOP/s those of plain PyTorch's matmuls and "
    "convolutions; peak MB what PyTorch allocates during a call.\n\n"
) + "\n".join(f"- `{name}`: {what}" for name, what in IMPLEMENTATIONS.items())


def _environment(report: Report) -> str:
    environment = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    ceilings = "; ".join(
        f"copy {c['bytes_per_second'] / 1e9:,.1f} GB/s, matmul in {dtype} {c['flops_per_second'] / 1e12:,.2f} TFLOP/s"
        for dtype, c in report.ceilings.items()
    )
    columns = [name for name in environment["backends"][0] if name != "device"]
    backends = [columns, *([str(row[name]) for name in columns] for row in environment["backends"])]
    return (
        f"{report.machine} of {environment['cores']} cores, {environment['system']}; {versions}; commit "
        f"{environment['commit']}.\n\nCeilings of this machine, measured: {ceilings}.\n\n"
        f"{format_table(backends, markdown=True)}\n\n"
        "Where it says reference, the fused side is plain PyTorch, and no gain is claimed for it."
    )


def _modelled_text(modelled: Mapping[str, Any]) -> str:
    given = modelled["assumptions"]
    rows = [["what", "size", "phase", "implementation", "launches", "MB", "GFLOP", "modelled us"]]
    for row in modelled["rows"]:
        names = [str(row[key]) for key in ("operator", "size", "phase", "implementation", "launches")]
        amounts = row["bytes"] / 1e6, row["flops"] / 1e9, 1e6 * row["modelled_seconds"]
        rows.append([*names, *(f"{amount:,.1f}" for amount in amounts)])
    missing = modelled["compile_missing"]
    return (
        "## Modelled for an H100, not measured\n\n"
        f"Batch {given['batch']}, {given['dtype']}: kernels counted without a GPU, each {assumed(given)}. The stem's "
        "compiled operators count as one launch each, and their FLOPs as plain PyTorch's, which is less than they do. "
        "Counted again by `python -m benchmarks.traffic`.\n\n"
        + format_table(rows, markdown=True)
        + (f"\n\n`torch.compile` is missing: {missing}" if missing else "")
    )


def _scaling_text(report: Report) -> str:
    """The scaling page: the picture, the points and the fitted exponents."""
    rows = [["axis", "phase", "implementation", "sizes", "ms", "peak MB", "time exponent", "memory exponent"]]
    for it in scaling_curves(report.results):
        times = " ".join(f"{1e3 * seconds:,.0f}" for seconds in it.seconds)
        memory = " ".join("-" if peak is None else f"{peak / 1e6:,.0f}" for peak in it.peak_bytes)
        exponents = [f"{it.time_exponent:.2f}", "-" if it.memory_exponent is None else f"{it.memory_exponent:.2f}"]
        names = [AXES[it.axis], it.phase, it.implementation, " ".join(map(str, it.sizes))]
        rows.append([*names, times, memory, *exponents])
    without = [
        f"\n\nNo point: {result.workload.name}: {entry.implementation} {entry.status}: {entry.reason}."
        for result in report.results
        for entry in result.entries
        if result.workload.axis and entry.median is None
    ]
    return (
        f"# Scaling of CeiT-T on {report.environment['chip']}, measured\n\n"
        "float32; along the image's side and the depth, batch 2. An exponent p says that time or memory grows as the "
        f"size to the power p. Doubling the side makes four times the tokens. Again: `{report.again('scaling')}`\n\n"
        "![time and memory by batch, image size and depth](scaling.png)\n\n"
        + format_table(rows, markdown=True)
        + "".join(without)
        + "\n"
    )
