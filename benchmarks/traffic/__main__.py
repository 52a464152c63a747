"""The command line: ``python -m benchmarks.traffic``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..tables import format_table
from ..workloads import PHASES, SIZES, Workload
from .blocks import BLOCKS, count_block
from .compiled import STORED, STORED_FOR, STORED_WITH, CompiledTrafficError
from .counting import Call, Kernel
from .workloads import ASSUMPTIONS, GPU_OPERATORS, assumed, count_workload, modelled_seconds

TIMED_BATCHES = (1, 64, 256)

# Launches and bytes of an operator by phase.
Figures = Mapping[str, tuple[int, int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables that were asked for; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.times and options.dtype == "float32":
        parser.error("--times: expected --dtype bfloat16 or float16, got float32")
    if options.image_size < 1 or options.image_size % 16:
        parser.error(f"--image-size: expected a multiple of 16, got {options.image_size}")
    if options.batch < 1:
        parser.error(f"--batch: expected at least 1, got {options.batch}")
    try:
        table = blocks_table if options.blocks else times_table if options.times else traffic_tables
        tables = table(options)
    except CompiledTrafficError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for title, rows in tables.items():
        print(f"{title}\n\n{format_table(rows, markdown=options.markdown)}\n")
    return 0


def traffic_tables(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Launches, megabytes and passes over the tokens (u) of each operator and phase, and if asked every kernel."""
    stored = (options.size, options.dtype, options.batch, options.image_size) == STORED_FOR
    rows = [
        ["operator", "phase", *(f"{by}{it}" for by in ("", "compile ", "plain ") for it in ("launches", "MB", "u"))]
    ]
    lists = {}
    for operator in options.operators or GPU_OPERATORS:
        workloads = [
            Workload(operator, options.size, phase, options.dtype, options.batch, options.image_size)
            for phase in PHASES
        ]
        unit_bytes = options.batch * workloads[0].tokens * SIZES[options.size] * workloads[0].torch_dtype.itemsize
        fused, plain = ([count_workload(w, by) for w in workloads] for by in ("fused", "plain"))
        compiled = STORED.get(operator, {}) if stored else {}
        if options.compiled:
            try:
                compiled = figures(*(count_workload(w, "compile") for w in workloads))
            except CompiledTrafficError as error:
                print(f"{error}; the stored figures take their place", file=sys.stderr)
        has_kernels = any(kernel.fused for call in fused for kernel in call.kernels)
        columns = (figures(*fused) if has_kernels else {}, compiled, figures(*plain))
        for phase, kernels in phases(*fused).items():
            rows.append([operator, phase, *(cell for c in columns for cell in _cells(c.get(phase), unit_bytes))])
            lists[f"{operator}, {phase}"] = _by_name(kernels)
        rows.append([operator, "saved for backward", *_cells((0, fused[1].saved_bytes), unit_bytes)])
        rows[-1] += ["-"] * 3 + _cells((0, plain[1].saved_bytes), unit_bytes)
    title = f"torch.compile: stored figures, counted with torch {STORED_WITH}, at the default sizes alone"
    if options.compiled:
        title = f"torch.compile: counted with torch {torch.__version__}"
    return {title: rows, **(lists if options.kernels else {})}


def times_table(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Modelled microseconds of LeFF on an H100 for each model and batch, fused and, if asked, by ``torch.compile``."""
    rows = [["LeFF", "batch", "phase", "fused, us", "torch.compile, us", "ratio"]]
    for size in SIZES:
        for batch in TIMED_BATCHES:
            for phase in PHASES:
                workload = Workload("leff", size, phase, options.dtype, batch, options.image_size)
                fused = modelled_seconds(count_workload(workload, "fused").kernels)
                compiled = ["-", "-"]
                if options.compiled:
                    seconds = modelled_seconds(count_workload(workload, "compile").kernels)
                    compiled = [f"{1e6 * seconds:,.0f}", f"{seconds / fused:.1f}"]
                rows.append([size, str(batch), phase, f"{1e6 * fused:,.0f}", *compiled])
    return {f"Modelled for an H100, not measured: each kernel {assumed(ASSUMPTIONS)}.": rows}


def blocks_table(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Launches and megabytes of the feed-forward blocks of other libraries' models, at sizes that these have."""
    implementations = ("fused", "compile", "plain") if options.compiled else ("fused", "plain")
    rows = [["block", "phase", *(f"{by} {it}" for by in implementations for it in ("launches", "MB"))]]
    for block in BLOCKS:
        counted = [
            figures(*(count_block(block, by, options.batch, options.dtype, training) for training in (False, True)))
            for by in implementations
        ]
        for phase in counted[0]:
            cells = [cell for found in counted for cell in _cells(found[phase], 1)[:2]]
            rows.append([block.name, phase, *cells])
    return {f"Blocks of other libraries' models, {options.batch} images, {options.dtype}": rows}


def phases(inference: Call, training: Call) -> dict[str, list[Kernel]]:
    """The kernels of both calls by phase."""
    return {
        "inference": inference.forward,
        "training forward": training.forward,
        "training backward": training.backward,
    }


def figures(inference: Call, training: Call) -> Figures:
    """Launches and bytes of both calls by phase."""
    found = phases(inference, training).items()
    return {phase: (len(kernels), sum(kernel.bytes for kernel in kernels)) for phase, kernels in found}


def _cells(figures: tuple[int, int] | None, unit_bytes: int) -> list[str]:
    if figures is None:
        return ["-"] * 3
    launches, moved = figures
    return [str(launches or "-"), f"{moved / 1e6:,.1f}", f"{moved / unit_bytes:.1f}"]


def _by_name(kernels: Iterable[Kernel]) -> list[list[str]]:
    """Kernels of one name together, those that move most first."""
    launches, moved = Counter(), Counter()
    for kernel in kernels:
        launches[kernel.name] += 1
        moved[kernel.name] += kernel.bytes
    rows = [[name, str(launches[name]), f"{size / 1e6:,.1f}"] for name, size in moved.most_common()]
    return [["kernel", "launches", "MB"], *rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description="Count the launches and the bytes of device memory of a call of each operator and of the whole "
        "model: fused, by torch.compile and by plain PyTorch. Nothing runs and no GPU is needed. u is one pass over "
        "the tokens: batch * tokens * channels elements, where lca has 12 tokens.",
    )
    size, dtype, batch, image_size = STORED_FOR
    add = parser.add_argument
    add("operators", nargs="*", choices=[*GPU_OPERATORS, []], metavar="OPERATOR", help=f"of {', '.join(GPU_OPERATORS)}")
    add("--size", choices=SIZES, default=size, help="of the model (%(default)s)")
    add("--batch", type=int, default=batch, help="images (%(default)s)")
    add("--image-size", type=int, default=image_size, help="side in pixels, a multiple of 16 (%(default)s)")
    add(
        "--dtype", choices=("bfloat16", "float16", "float32"), default=dtype, help="of tokens and weights (%(default)s)"
    )
    add(
        "--compiled",
        action="store_true",
        help="count the kernels of torch.compile now, with the PyTorch that is installed, which takes minutes for a "
        f"model, in place of the figures stored from torch {STORED_WITH}",
    )
    add("--kernels", action="store_true", help="also list what the fused operators spend their bytes on")
    add(
        "--times",
        action="store_true",
        help="in place of the traffic, the time that LeFF would take on an H100 in CeiT-T, S and B at batch 1, 64 and "
        "256: modelled from bytes, FLOPs and launches, not measured; with --compiled beside torch.compile's",
    )
    add(
        "--blocks",
        action="store_true",
        help="in place of the operators, the feed-forward blocks of SegFormer, PVTv2, EfficientFormerV2, TinyViT and "
        "MobileNetV2; with --compiled beside torch.compile's",
    )
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
