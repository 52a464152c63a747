"""What an H100 would take by its bandwidth, its tensor cores and its launches: modelled from counted kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ceit_kernels import fuse

from .harness.kernels import with_stem_products
from .harness.workloads import Workload
from .traffic import Call, CompiledTrafficError, Kernel, count_call, modelled_seconds
from .traffic.cases import Case, make_cases
from .traffic.model import TrafficOptions, count_model
from .traffic.modelled import BYTES_PER_SECOND, FLOPS_PER_SECOND, LAUNCH_SECONDS

MODELS = {"tiny": 192, "small": 384}
BATCH = 256


def model_gpu() -> dict[str, Any]:
    """Modelled times of the operators and of the whole models in bfloat16 at batch 256, plain, compiled and fused.

    Returns:
        {"rows": times with bytes and launches, "kernels": every fused kernel of the operators, "assumptions": what the
        model takes}, as JSON has it. ``torch.compile`` is left out, with the reason, where it cannot be counted.
    """
    rows, kernels = [], []
    for size, channels in MODELS.items():
        for case in _cases(size, channels):
            for training in (False, True):
                phase = "training" if training else "inference"
                calls = {"fused": with_stem_products(case.count_fused(training=training), _plain_stem(training))}
                reason = ""
                try:
                    calls["compile"] = case.count_compiled(training=training)
                except CompiledTrafficError as error:
                    reason = str(error)
                for implementation, call in calls.items():
                    rows.append(_row(case.operator, size, phase, implementation, call.forward + call.backward, reason))
                fused = calls["fused"]
                kernels += [
                    {"operator": case.operator, "size": size, "phase": phase, "name": k.name, **_figures([k])}
                    for k in fused.forward + fused.backward
                    if k.fused
                ]
        rows += _models(size)
    return {
        "rows": rows,
        "kernels": kernels,
        "assumptions": {
            "bytes_per_second": BYTES_PER_SECOND,
            "flops_per_second": FLOPS_PER_SECOND,
            "launch_seconds": LAUNCH_SECONDS,
            "batch": BATCH,
            "dtype": "bfloat16",
        },
    }


def _cases(size: str, channels: int) -> list[Case]:
    norm = Workload("add_norm", size, "training", "bfloat16", BATCH)
    tokens = math.prod(norm.shape)
    return [
        *make_cases(BATCH, channels, 224, torch.bfloat16),
        Case("add_norm", lambda: fuse(norm.make_module()), norm.make_module, norm.shape, tokens, norm.torch_dtype),
    ]


def _models(size: str) -> list[dict[str, Any]]:
    options = TrafficOptions(model=f"ceit_{size}_patch16_224", batch_size=BATCH)
    rows = []
    for phase, counted in (("inference", "inference"), ("training", "training step")):
        for implementation in ("plain", "fused"):
            call = with_stem_products(count_model(options, implementation, counted), _plain_stem(phase == "training"))
            rows.append(_row("model", size, phase, implementation, call.forward + call.backward, ""))
    return rows


@functools.cache
def _plain_stem(training: bool) -> Call:
    stem = Workload("i2t", "tiny", "training" if training else "inference", "bfloat16", BATCH)
    return count_call(stem.make_module, stem.shape, stem.torch_dtype, training=training, input_gradient=False)


def _row(
    operator: str, size: str, phase: str, implementation: str, kernels: Sequence[Kernel], reason: str
) -> dict[str, Any]:
    names = {"operator": operator, "size": size, "phase": phase, "implementation": implementation}
    return {**names, "launches": len(kernels), "compile_reason": reason, **_figures(kernels)}


def _figures(kernels: Sequence[Kernel]) -> dict[str, float]:
    return {
        "bytes": sum(kernel.bytes for kernel in kernels),
        "flops": sum(kernel.flops for kernel in kernels),
        "modelled_seconds": modelled_seconds(kernels),
    }
