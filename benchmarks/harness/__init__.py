"""Benchmarks: implementations that are checked, take turns and are timed alike. Started by `python -m ceit bench`."""
