"""The decorator of Triton kernels that are launched; functions that they call have ``triton.jit``."""

import triton

__all__ = ["BY_BATCH", "kernel"]

# Arguments that follow from the number of images. Triton would compile anew where one of them is 1 or a multiple of 16,
# which nothing gains from, since vectors run along channels: a last, smaller batch would wait for the compiler.
# Nor does how many tokens attend matter: only the class token of a last block may.
BY_BATCH = ("B", "M", "IMAGES", "ROWS", "S", "T", "S1", "S2", "S3", "S4", "GROUP", "COUNTERS", "QUERIES")

kernel = triton.jit(do_not_specialize=BY_BATCH)
