"""The ways to compute LeFF.

native      compiled code, on the CPU
triton      fused kernels: the GEMMs with all that stands around them
library     PyTorch's GEMMs, and kernels that stream for all that stands between them
reference   plain PyTorch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pkgutil import resolve_name
from typing import Any

__all__ = ["PIPELINES", "code"]

# What runs a phase, by backend.
PIPELINES: Mapping[str, Mapping[str, str]] = {
    "inference": {
        "native": ".cpu:leff_inference_native",
        "triton": ".triton.launch_inference:leff_inference_triton",
        "library": ".triton.launch_library:leff_inference_library",
    },
    "forward": {
        "native": ".cpu:leff_forward_native",
        **dict.fromkeys(("triton", "library"), ".triton.launch_forward:leff_forward_triton"),
    },
    "backward": {
        "native": ".cpu:leff_backward_native",
        **dict.fromkeys(("triton", "library"), ".triton.launch_backward:leff_backward_triton"),
    },
}


@cache
def code(phase: str, backend: str) -> Callable[..., Any]:
    """The function that runs a phase by a backend."""
    return resolve_name(f"{__package__}{PIPELINES[phase][backend]}")
