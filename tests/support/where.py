"""Where the Triton kernels of this test run execute.

One of three: on a CUDA GPU; in Triton's interpreter (TRITON_INTERPRET=1); under ``python -m ttsem.sanitize``, which
executes the compiler's IR and pretends that a GPU is there. A run without any of them leaves the tests of kernels out.
"""

import os
import sys

import torch

UNDER_TTSEM = "ttsem.sanitize" in sys.modules or getattr(sys.modules.get("__main__"), "__package__", "") == "ttsem"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not UNDER_TTSEM
KERNELS_RUN = ON_GPU or INTERPRETING or UNDER_TTSEM

DEVICE = "cuda" if ON_GPU or UNDER_TTSEM else "cpu"
# The interpreter computes wrongly in bfloat16.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])
