"""Whether an implementation computes what the plain module does: a time counts only then."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Largest relative error, in the 2-norm, of an output and of a gradient. A training model's norms multiply rounding.
TOLERANCES = {"float64": (1e-9, 1e-8), "float32": (1e-4, 2e-3), "bfloat16": (3e-2, 1.5e-1), "float16": (1e-2, 5e-2)}
# A gradient that is zero but for rounding is compared with the others' size.
_SMALL = 1e-2


def check_outputs(
    out: Tensor, expected: Tensor, gradients: Mapping[str, Tensor], expected_gradients: Mapping[str, Tensor], dtype: str
) -> str:
    """What is wrong with an implementation's output or gradients by name; empty if they agree with the plain module's.

    Args:
        out: the implementation's output.
        expected: the plain module's.
        gradients: the implementation's gradients by name.
        expected_gradients: the plain module's; none at inference.
        dtype: which tolerance to take, as in `TOLERANCES`.
    """
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    if out.shape != expected.shape:
        return f"output: expected shape {tuple(expected.shape)}, got {tuple(out.shape)}"
    error = _relative_error(out, expected, 0.0)
    if not error <= tolerance:
        return f"output: relative error {error:.1e}, expected at most {tolerance:.0e}"
    largest = max((_norm(g) for g in expected_gradients.values()), default=0.0)
    for name, wanted in expected_gradients.items():
        if name not in gradients:
            # No gradient and one of zeros say the same.
            if _norm(wanted) > 0:
                return f"gradient of {name}: there is none"
            continue
        error = _relative_error(gradients[name], wanted, _SMALL * largest)
        if not error <= gradient_tolerance:
            return f"gradient of {name}: relative error {error:.1e}, expected at most {gradient_tolerance:.0e}"
    return ""


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def _relative_error(got: Tensor, wanted: Tensor, at_least: float) -> float:
    """Error relative to the wanted tensor's norm, or to `at_least` where that is larger; NaN stays NaN."""
    difference = _norm(got.detach().double() - wanted.detach().double())
    size = max(_norm(wanted), at_least)
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
