"""Estimated times of LeFF's kernels on an H100 from their machine code: ``python -m benchmarks.cycles small training``.

A bound says what no kernel can beat, and one kernel took seven times its own. This model follows the instructions of
an SM's warps one by one, with the stalls and scoreboards that the assembler wrote into them. It is an estimate,
calibrated on the one table that an H100 measured (``measured``), and believed to 15%, less where loops branch.
"""
