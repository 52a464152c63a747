"""LeFF on the CPU: products by ``csrc/cpu/gemm``, and all between them by the compiled stages of ``csrc/cpu/leff``.

The stages take tensors (B, rows, channels) whose rows before the image's tokens are prefix tokens, so nothing is split
or copied. z1 has rows for the prefix tokens too, which nobody reads; z2 and z3 have none. Norm and gradient arrays are
those of the Triton kernels.
"""
