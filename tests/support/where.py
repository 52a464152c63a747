"""Where the Triton kernels of this test run execute.

One of three: on a CUDA GPU; in Triton's interpreter (TRITON_INTERPRET=1); under ``python -m ttsem.sanitize``, which
executes the compiler's IR and pretends that a GPU is there. A run without any of them leaves the tests of kernels out.
"""

import os
import sys
from contextlib import contextmanager

import torch

UNDER_TTSEM = "ttsem.sanitize" in sys.modules or getattr(sys.modules.get("__main__"), "__package__", "") == "ttsem"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not UNDER_TTSEM
KERNELS_RUN = ON_GPU or INTERPRETING or UNDER_TTSEM

DEVICE = "cuda" if ON_GPU or UNDER_TTSEM else "cpu"
# The interpreter computes wrongly in bfloat16.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])
# At random sizes plain PyTorch's float32 is now and then right by luck, which no factor on its error allows for; there
# float64 is compared to rounding. The 16-bit kernels accumulate in float32, which leaves luck no room.
ANY_SIZE_DTYPES = [*DTYPES[1:], *([] if UNDER_TTSEM else [torch.float64])]


@contextmanager
def autocast(dtype):
    """Autocast for the tensors of the kernels.

    Those of ttsem say that they are on a GPU, by which fused operators ask, and are on the CPU for PyTorch's operators.
    """
    with torch.autocast("cpu" if UNDER_TTSEM else DEVICE, dtype):
        if not UNDER_TTSEM:
            yield
            return
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        _set_autocast_on_gpu(True, dtype)
        try:
            yield
        finally:
            _set_autocast_on_gpu(*before)


def _set_autocast_on_gpu(enabled, dtype):
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)
