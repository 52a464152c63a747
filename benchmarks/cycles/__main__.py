"""The command line: ``python -m benchmarks.cycles small training --backend library``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import Launch, record_launches
from ceit_kernels.leff.arguments import Settings
from ceit_kernels.leff.pipelines import code

from ..tables import format_table
from ..traffic.access import launch_bytes
from ..traffic.counting import Kernel as Counted
from ..traffic.counting import counted_operators
from ..traffic.workloads import count_workload
from ..workloads import SIZES, Workload
from .kernels import KERNELS, estimate

# On the H100 that was measured an 8192 cubed product ran at 683 TFLOP/s; smaller ones are taken to run at less.
LIBRARY_FLOPS, BYTES = 600e12, 3.0e12


def calls_of(channels: int, phase: str, backend: str, batch: int = 256) -> tuple[list[Launch], list[Counted]]:
    """The launches of LeFF for images of 14 x 14 tokens and a class token in bfloat16, and the library's GEMMs."""
    dtype = torch.bfloat16
    with FakeTensorMode(), record_launches() as launches, counted_operators() as operators:
        x = torch.empty(batch, 197, channels, dtype=dtype, device="cuda")
        parameters: list[Any] = []
        for size in ((4 * channels, channels, 1, 1), (4 * channels, 1, 3, 3), (channels, 4 * channels, 1, 1)):
            parameters += [x.new_empty(size), *(x.new_empty(size[0]) for _ in range(5))]
        norm = "frozen" if phase == "inference" else "batch"
        settings = Settings([1e-5] * 3, [norm] * 3, 14, 14, 1, ["gelu"] * 2, None, None, backend)
        if phase == "inference":
            code(phase, backend)(x, parameters, None, settings, dtype)
        else:
            out, *saved = code("forward", backend)(x, parameters, None, settings, dtype)
            code("backward", backend)(torch.empty_like(out), x, parameters, saved, settings, True, [True] * 12)
    return launches, [operator for operator in operators if operator.flops]


Row = tuple[str, float, float, str]


def rows(launches: Sequence[Launch], gemms: Sequence[Counted]) -> Iterator[Row]:
    """Name, least and most microseconds of each kernel, and how they were come by."""
    for launch in launches:
        name = launch.kernel.__name__
        if name in KERNELS:
            found = estimate(launch)
            what = f"{found.registers} registers, {found.shared_bytes >> 10} KiB, {found.instances} an SM"
            yield name, found.low, found.high, what
        else:
            microseconds = 1e6 * launch_bytes(launch) / BYTES
            yield name, microseconds, microseconds, "by its bytes"
    for gemm in gemms:
        microseconds = 1e6 * max(gemm.flops / LIBRARY_FLOPS, gemm.bytes / BYTES)
        yield gemm.name, microseconds, microseconds, f"taken at {LIBRARY_FLOPS / 1e12:.0f} TFLOP/s"


def model_rows(size: str, phase: str, found: Sequence[Row]) -> Iterator[Row]:
    """The whole model: LeFF by its kernels that were found for this phase, all else by its bytes or its matmuls.

    The last block's LeFF is none at inference; in training its forward enters running statistics and goes by its bytes.
    """
    call = count_workload(Workload("model", size, phase, "bfloat16", 256), "fused")
    last = "leff_factored_gradient_kernel" if phase == "training" else "leff_contract_kernel"
    layers = [kernel.name for kernel in call.kernels].count(last)
    low, high = (layers * sum(row[i] for row in found) for i in (1, 2))
    yield f"{layers} LeFF", low, high, "the kernels above"
    forward = [kernel for kernel in call.forward if kernel.name.startswith("leff")]
    each = ceil(len(forward) / (layers + 1))  # but for the last block's, which lacks the pass for its result
    more = forward[layers * each :] if phase == "training" else []
    others = [kernel for kernel in call.kernels if not kernel.name.startswith("leff")]
    for name, kernels in (("LeFF of the last block", more), ("all else", others)):
        if kernels:
            microseconds = sum(1e6 * max(k.flops / LIBRARY_FLOPS, k.bytes / BYTES) for k in kernels)
            yield name, microseconds, microseconds, f"{len(kernels)} kernels by their bytes or matmuls"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description="Estimate LeFF's kernels.")
    parser.add_argument("size", choices=SIZES, help="of the model")
    parser.add_argument("phase", choices=("inference", "training"))
    parser.add_argument("--backend", choices=("triton", "library"), default="triton", help="(%(default)s)")
    parser.add_argument("--model", action="store_true", help="go on to the whole model, of 256 images in bfloat16")
    options = parser.parse_args(arguments)
    found = list(rows(*calls_of(SIZES[options.size], options.phase, options.backend)))
    whole = [*model_rows(options.size, options.phase, found)] if options.model else []
    for part, name in ((found, "sum, without gaps between kernels"), (whole, "the model, likewise")):
        if part:
            low, high = (sum(row[i] for row in part) for i in (1, 2))
            part.append((name, low, high, ""))
    found += whole
    table = [["kernel", "us, estimated", "how"]]
    table += [[name, f"{low:,.0f} to {high:,.0f}", how] for name, low, high, how in found]
    print(format_table(table, markdown=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
