"""The report: Markdown tables, JSON and pictures of what was measured and of what was modelled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .harness.command import entry_row
from .harness.implementations import DESCRIPTIONS, OURS
from .harness.measure import Entry, Result
from .pictures import draw_all
from .traffic import format_table

Report = Mapping[str, Any]
_LONG_CALL_SECONDS = 0.01


def write_report(data: Report, folder: Path) -> list[str]:
    """Write report.json, report.md, scaling.md and the pictures.

    Args:
        data: what `benchmarks.__main__` measured.
        folder: where to, which exists.

    Returns:
        A line for every refused implementation.
    """
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    pictures = draw_all(data, folder)
    (folder / "report.md").write_text(report_text(data, pictures))
    if data["scaling"]:
        (folder / "scaling.md").write_text(scaling_text(data))
    results = [to_result(result) for result in data["measured"]]
    refused = [f"{r.name}: {e.implementation}: {e.reason}" for r in results for e in r.entries if e.status == "refused"]
    return refused + list(data.get("scaling_refused", []))


def to_result(stored: Mapping[str, Any]) -> Result:
    """A `Result` from its JSON."""
    return Result(**{**stored, "entries": [Entry(**entry) for entry in stored["entries"]]})


def report_text(data: Report, pictures: Mapping[str, str]) -> str:
    """The report in Markdown; `pictures` has file names by title."""
    parts = ["# Benchmarks", f"Made by `{data['command']}` in {data['seconds'] / 60:.0f} minutes.", _environment(data)]
    parts += filter(None, [disturbance_text(data)])
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    parts.append(f"## Measured on {data['environment']['chip']}\n\n{_legend()}")
    for stored in data["measured"]:
        result = to_result(stored)
        head = [
            "implementation",
            "ms",
            "plain / this",
            "99% interval",
            "GB/s",
            "TFLOP/s",
            "peak MB",
            "saved MB",
            "note",
        ]
        methods = sorted({entry.method for entry in result.entries if entry.method})
        launches = {e.implementation: e.launches for e in result.entries if e.launches is not None}
        parts.append(
            f"### {result.name}\n\n"
            + format_table([head, *(entry_row(entry, result) for entry in result.entries)], markdown=True)
            + f"\n\n{_rounds(result)}, {', '.join(methods)}"
            + (f"; launches: {', '.join(f'{k} {v}' for k, v in launches.items())}" if launches else "")
            + f". Again: `{again(data, result.name)}`"
            + _kernels_text(result)
        )
    if data.get("failed"):
        parts.append("Not measured, because plain PyTorch failed:\n\n" + "\n".join(f"- {it}" for it in data["failed"]))
    if data["left_out"]:
        parts.append(f"Left out, because the run's time was used up: {', '.join(data['left_out'])}.")
    parts.append(modelled_text(data))
    return "\n\n".join(parts) + "\n"


def again(data: Report, workload: str) -> str:
    """The command that measures a workload of a report again; those of a quick run are in no other plan."""
    return f"python -m ceit bench {'--quick ' if '--quick' in data['command'] else ''}--only {workload}"


def _kernels_text(result: Result) -> str:
    """The fused kernels of a workload that were timed on a GPU, and those that could not be told apart."""
    rows = [["kernel", "launches", "us", "GB/s", "TFLOP/s"]]
    unmatched = []
    for entry in result.entries:
        unmatched += entry.unmatched
        for kernel in entry.kernels:
            seconds = kernel["seconds"]
            rates = f"{kernel['bytes'] / seconds / 1e9:,.0f}", f"{kernel['flops'] / seconds / 1e12:,.1f}"
            rows.append([kernel["name"], str(kernel["launches"]), f"{1e6 * seconds:,.1f}", *rates])
    table = "\n\nIts kernels, profiled; bytes and products as counted:\n\n" + format_table(rows, markdown=True)
    return (table if len(rows) > 1 else "") + "".join(f"\n\nNo time for {line}." for line in unmatched)


def disturbances(data: Report) -> list[str]:
    """Signs that something else used the machine: the same code at another speed, or a rate beyond a ceiling."""
    signs = []
    for result in map(to_result, data["measured"]):
        ceiling = data["ceilings"][result.workload["dtype"]]["flops_per_second"]
        for entry in result.entries:
            if entry.median is None:
                continue
            # Other runtimes choose their own algorithms, a product of theirs may beat this one; fused LCA needs a sixth
            # of plain's products.
            same_products = ("plain",) if result.workload["operator"] == "lca" else ("plain", *OURS)
            if result.flops / entry.median > 1.1 * ceiling and entry.implementation in same_products:
                signs.append(f"{result.name}: {entry.implementation} is above the ceiling of a product")
            same_code = {by["backend"] for by in entry.backends.values()} == {"reference"}
            # To choose the reference takes the fused modules some time, which shows in a short call.
            slower = entry.ratio["value"] < 0.9 and entry.median > _LONG_CALL_SECONDS
            if same_code and (slower or entry.ratio["value"] > 1.1):
                share = f"1/{entry.ratio['value']:.2f} of its time"
                signs.append(f"{result.name}: {entry.implementation} is plain PyTorch here, yet took {share}")
    return signs


def disturbance_text(data: Report) -> str:
    """A warning, or nothing."""
    signs = disturbances(data)
    return f"**The machine was disturbed; do not rely on these times.** {'; '.join(signs)}." if signs else ""


def _rounds(result: Result) -> str:
    rounds = max(len(entry.seconds) for entry in result.entries)
    inputs = f", {result.rotating_inputs} inputs in rotation" if result.rotating_inputs > 1 else ""
    return f"{rounds} rounds{inputs}"


def _legend() -> str:
    lines = [f"- `{name}`: {what}" for name, what in DESCRIPTIONS.items()]
    return (
        "Medians of rounds in which the implementations take turns. Above 1, plain / this is faster than plain. "
        "Outputs, and in training gradients, were compared with plain PyTorch's before a time counted. GB/s are those "
        "of the input, the output and the parameters, which nothing avoids; TFLOP/s those of plain PyTorch's products; "
        "peak MB what PyTorch allocates during a call.\n\n" + "\n".join(lines)
    )


def _environment(data: Report) -> str:
    environment = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    ceilings = "; ".join(
        f"copy {c['bytes_per_second'] / 1e9:,.1f} GB/s, product in {dtype} {c['flops_per_second'] / 1e12:,.2f} TFLOP/s"
        for dtype, c in data["ceilings"].items()
    )
    backends = format_table(
        [
            ["fused operator", "runs by", "why"],
            *([b["operator"], b["backend"] or "none", b["reason"]] for b in environment["backends"]),
        ],
        markdown=True,
    )
    return (
        f"{environment['chip']}, {environment['threads']} threads of {environment['cores']} cores, "
        f"{environment['system']}; {versions}; commit {environment['commit']}.\n\n"
        f"Ceilings of this machine, measured: {ceilings}.\n\n{backends}\n\n"
        "Where it says reference, the fused side is plain PyTorch, and no gain is claimed for it."
    )


def modelled_text(data: Report) -> str:
    """The modelled part in Markdown."""
    modelled = data["modelled"]
    given = modelled["assumptions"]
    rows = [["what", "size", "phase", "implementation", "launches", "MB", "GFLOP", "modelled us"]]
    for row in modelled["rows"]:
        names = [row[key] for key in ("operator", "size", "phase", "implementation", "launches")]
        amounts = [row["bytes"] / 1e6, row["flops"] / 1e9, 1e6 * row["modelled_seconds"]]
        rows.append([*map(str, names), *(f"{amount:,.1f}" for amount in amounts)])
    reasons = {row["compile_reason"] for row in modelled["rows"]} - {""}
    return (
        "## Modelled for an H100, not measured\n\n"
        f"Batch {given['batch']}, {given['dtype']}: kernels counted without a GPU, each its bytes at "
        f"{given['bytes_per_second'] / 1e12:.1f} TB/s or its products at {given['flops_per_second'] / 1e12:.0f} "
        f"TFLOP/s, whichever takes longer, and {1e6 * given['launch_seconds']:.0f} us a launch. The stem's compiled "
        "operators count as one launch each, and their products as plain PyTorch's, which is less than they do. "
        "Counted again by `python -m benchmarks.traffic` and `python -m benchmarks.traffic.model`.\n\n"
        + format_table(rows, markdown=True)
        + "".join(f"\n\n`torch.compile` is missing: {reason}" for reason in sorted(reasons))
    )


def scaling_text(data: Report) -> str:
    """The scaling page: the picture, the points and the fitted exponents."""
    rows = [["axis", "phase", "implementation", "sizes", "ms", "peak MB", "time exponent", "memory exponent"]]
    for curve in data["scaling"]:
        memory = curve["memory_exponent"]
        rows.append(
            [
                curve["axis"],
                curve["phase"],
                curve["implementation"],
                " ".join(map(str, curve["sizes"])),
                " ".join(f"{1e3 * seconds:,.0f}" for seconds in curve["seconds"]),
                " ".join("-" if peak is None else f"{peak / 1e6:,.0f}" for peak in curve["peak_bytes"]),
                f"{curve['time_exponent']:.2f}",
                "-" if memory is None else f"{memory:.2f}",
            ]
        )
    return (
        f"# Scaling of CeiT-T on {data['environment']['chip']}, measured\n\n"
        "float32; along the image's side and the depth, batch 2. An exponent p says that time or memory grows as the "
        "size to the power p. Doubling the side makes four times the tokens. Again: `python -m benchmarks --only "
        "scaling`\n\n"
        "![time and memory by batch, image size and depth](scaling.png)\n\n"
        + format_table(rows, markdown=True)
        + "".join(f"\n\nNo point: {line}." for line in data.get("scaling_refused", []))
        + "\n"
    )
