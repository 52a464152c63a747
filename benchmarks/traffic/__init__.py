"""Launches and bytes of device memory, counted without a GPU: ``python -m benchmarks.traffic``."""

from .compiled import CompiledTrafficError, count_compiled
from .counting import Call, Kernel, SavedTensors, count_call
from .workloads import assumed, count_workload, model_gpu, modelled_seconds

__all__ = [
    "Call",
    "CompiledTrafficError",
    "Kernel",
    "SavedTensors",
    "assumed",
    "count_call",
    "count_compiled",
    "count_workload",
    "model_gpu",
    "modelled_seconds",
]
