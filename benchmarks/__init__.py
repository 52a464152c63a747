"""Benchmarks of the fused operators: `pytest benchmarks --benchmark-only`, and the report of `make bench`."""
