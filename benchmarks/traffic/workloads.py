"""Counted workloads, and the times that an H100 would take by its bandwidth, its tensor cores and its launches.

These times are modelled, not measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ceit_kernels import fuse
from ceit_kernels.operators import OPERATORS as SPECS

from ..workloads import OPERATORS, PHASES, Workload
from .compiled import CompiledTrafficError, count_compiled
from .counting import Call, Kernel, count_call

# Those with kernels for a GPU, and the model.
GPU_OPERATORS = (
    *(n for n in OPERATORS if n != "model" and any("cuda" in it for it in SPECS[n].implementations.values())),
    "model",
)
# Of an H100: copies, dense matmuls in 16 bits, and the time between the end of a kernel and the start of the next.
ASSUMPTIONS = {"bytes_per_second": 3.0e12, "flops_per_second": 790e12, "launch_seconds": 2e-6}


def count_workload(workload: Workload, implementation: str, chip: int = 90) -> Call:
    """The kernels of a call by "plain", "fused" or "compile", on a GPU of a compute capability, times ten.

    The stem's compiled operators count as one kernel each, with the FLOPs of the plain stem: they do no fewer.

    Raises:
        CompiledTrafficError: the kernels of this version's torch.compile cannot be counted.
    """
    arguments = {"training": workload.training, "input_gradient": workload.input_gradient}
    if implementation == "compile":
        return count_compiled(workload.make_module, workload.shape, workload.torch_dtype, **arguments)
    fused = implementation == "fused"
    make = (lambda: fuse(workload.make_module())) if fused else workload.make_module
    call = count_call(make, workload.shape, workload.torch_dtype, **arguments, chip=chip)
    if fused and workload.operator in ("i2t", "model"):
        forward, backward = _stem_flops(replace(workload, operator="i2t", depth=None, axis=""))
        call.forward, call.backward = _with_stem(call.forward, forward), _with_stem(call.backward, backward)
    return call


@functools.cache
def _stem_flops(stem: Workload) -> tuple[int, int]:
    call = count_workload(stem, "plain")
    return sum(kernel.flops for kernel in call.forward), sum(kernel.flops for kernel in call.backward)


def _with_stem(kernels: list[Kernel], flops: int) -> list[Kernel]:
    return [replace(kernel, flops=flops) if kernel.fused and "i2t" in kernel.name else kernel for kernel in kernels]


def modelled_seconds(kernels: Iterable[Kernel]) -> float:
    """The least that these kernels take one after another: each its bytes' or its FLOPs' time, and a launch."""
    memory, arithmetic, launch = ASSUMPTIONS.values()
    return sum(max(kernel.bytes / memory, kernel.flops / arithmetic) + launch for kernel in kernels)


def assumed(assumptions: Mapping[str, Any]) -> str:
    """What a kernel takes by the model, in words."""
    memory, arithmetic, launch = (assumptions[name] for name in ASSUMPTIONS)
    return (
        f"its bytes at {memory / 1e12:.1f} TB/s or its matmuls at {arithmetic / 1e12:.0f} TFLOP/s, whichever takes "
        f"longer, and {1e6 * launch:.0f} us a launch"
    )


def model_gpu(batch: int = 256) -> dict[str, Any]:
    """Modelled times of the operators and of the whole models in bfloat16: operators compiled and fused, models plain.

    Returns:
        {"rows": times with bytes and launches, "kernels": every fused kernel of the operators, "assumptions": what the
        model takes}, as JSON has it. ``torch.compile`` is left out, with the reason, where it cannot be counted.
    """
    rows, kernels = [], []
    for size in ("tiny", "small"):
        for operator in GPU_OPERATORS:
            for phase in PHASES:
                workload = Workload(operator, size, phase, "bfloat16", batch)
                reason = ""
                for implementation in ("fused", "plain" if operator == "model" else "compile"):
                    names = {"operator": operator, "size": size, "phase": phase, "implementation": implementation}
                    try:
                        call = count_workload(workload, implementation)
                    except CompiledTrafficError as error:
                        reason = str(error)
                        continue
                    rows.append({**names, "launches": len(call.kernels), **_figures(call.kernels)})
                    if operator != "model":
                        kernels += [{**names, "name": k.name, **_figures([k])} for k in call.kernels if k.fused]
    assumptions = {**ASSUMPTIONS, "batch": batch, "dtype": "bfloat16"}
    return {"rows": rows, "kernels": kernels, "compile_missing": reason, "assumptions": assumptions}


def _figures(kernels: list[Kernel]) -> dict[str, float]:
    return {
        "bytes": sum(kernel.bytes for kernel in kernels),
        "flops": sum(kernel.flops for kernel in kernels),
        "modelled_seconds": modelled_seconds(kernels),
    }
