"""Benchmarks of the fused operators: `pytest benchmarks --benchmark-only`, in other words `python -m benchmarks`."""

import os

# The profiler that sums up memory otherwise speaks of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
