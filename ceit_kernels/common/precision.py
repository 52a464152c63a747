"""How a kernel computes for a PyTorch dtype."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

__all__ = ["precision_arguments", "short_precision"]

_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def precision_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """The constants COMPUTE, ACC and PRECISION of a kernel whose matmuls take operands of ``dtype``.

    float32 matmuls follow ``torch.backends.cuda.matmul``: its ``allow_tf32``, or ``fp32_precision``, which reads both.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "COMPUTE": _TRITON_DTYPES[dtype],
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def short_precision() -> str:
    """PRECISION of matmuls of float32 operands whose result is rounded to 16 bits."""
    # Triton refuses tf32 on most of AMD's chips.
    return "tf32" if torch.version.hip is None else "ieee"
