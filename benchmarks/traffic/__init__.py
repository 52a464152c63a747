"""Launches and bytes of device memory, counted without a GPU: ``python -m benchmarks.traffic``."""

from .compiled import CompiledTrafficError, count_compiled
from .counting import Call, Kernel, count_call
from .workloads import count_workload, model_gpu, modelled_seconds

__all__ = [
    "Call",
    "CompiledTrafficError",
    "Kernel",
    "count_call",
    "count_compiled",
    "count_workload",
    "model_gpu",
    "modelled_seconds",
]
