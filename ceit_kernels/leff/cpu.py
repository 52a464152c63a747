"""LeFF on the CPU: one compiled call for inference, one for the forward and one for the backward pass (csrc/cpu/leff).

The kernels take tensors (B, rows, channels) whose rows before the image's tokens are prefix tokens, so nothing is split
or copied. z1 has rows for the prefix tokens too, which no kernel reads; z2 and z3 have none. Norm and gradient arrays
are laid out as the Triton kernels lay them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.sync_norm import gather_moments, sum_over_processes
from .activations import INDICES
from .arguments import NORM_MODES, Settings, parameters_per_layer
from .grid import empty_tokens_like, is_planar

__all__ = [
    "in_compute_dtype",
    "kernels",
    "leff_backward_native",
    "leff_forward_native",
    "leff_inference_native",
    "leff_sizes",
]

for _schema in (
    "_leff_infer(Tensor x, Tensor?[] parameters, Tensor? prepacked, Tensor? residual, float[] eps, int[] sizes, "
    "Tensor(a!) out) -> ()",
    "_leff_prepack(Tensor like, Tensor?[] parameters, float[] eps, int[] sizes) -> Tensor",
    "_leff_train(Tensor x, Tensor?[] parameters, Tensor? residual, Tensor prefix, float[] eps, int[] modes, "
    "int[] sizes, str group, Tensor(a!) out) -> Tensor[]",
    "_leff_train_backward(Tensor dout, Tensor x, Tensor?[] parameters, Tensor[] saved, int[] modes, int[] sizes, "
    "str group, bool need_x, int needs) -> Tensor[]",
    # Called by the compiled code.
    "_leff_gather_moments(Tensor moments, Tensor count, str group) -> (Tensor, Tensor)",
    "_leff_sum_over_processes(Tensor sums, str group) -> Tensor",
):
    torch.library.define(f"ceit::{_schema.partition('(')[0]}", f"({_schema.partition('(')[2]}")
torch.library.impl("ceit::_leff_gather_moments", "default", gather_moments)
torch.library.impl("ceit::_leff_sum_over_processes", "default", sum_over_processes)

kernels = torch.ops.ceit


def leff_sizes(
    parameters: Sequence[Tensor | None], activations: Sequence[str], grid_size: tuple[int, int]
) -> list[int]:
    """The ``sizes`` of ``ceit::_leff_infer`` but for the stride, from parameters in the registered operators' order."""
    weight1, weight2, weight3 = parameters[::parameters_per_layer]
    sizes = [weight1.shape[1], weight1.shape[0], weight3.shape[0], weight2.shape[-1]]
    return [*sizes, *(INDICES[name] for name in activations), *grid_size]


def in_compute_dtype(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The parameters with weights cast to the dtype of the GEMMs; the kernels read vectors of any dtype."""
    return [tensor.to(dtype) if i % parameters_per_layer == 0 else tensor for i, tensor in enumerate(parameters)]


def leff_inference_native(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype,
) -> Tensor:
    """The registered operator's result, its arguments checked; B at least 1.

    Works image by image, so that hidden tokens stay in cache. The result is in memory as x and residual are.
    """
    dtype = settings.compute_dtype or x.dtype
    parameters = in_compute_dtype(parameters, dtype)
    sizes = leff_sizes(parameters, settings.activations, (settings.height, settings.width))
    out = empty_tokens_like(x, sizes[2], dtype, is_planar(x))
    alike = out_dtype == dtype
    added = residual.to(dtype) if alike and residual is not None else None
    kernels._leff_infer(x.to(dtype), parameters, None, added, settings.eps, [*sizes, 1], out)
    if alike:
        return out
    # Under autocast prefix tokens and residual are not rounded to the dtype of the GEMMs.
    out = out.to(out_dtype)
    if settings.num_prefix_tokens:
        out[:, : settings.num_prefix_tokens] = x[:, : settings.num_prefix_tokens]
    return out if residual is None else out.add_(residual)


def leff_forward_native(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The results of ``ceit::leff``, its arguments checked; x and residual contiguous, B at least 1."""
    dtype = settings.compute_dtype or x.dtype
    if residual is not None and residual.dtype == torch.float64 != x.dtype:  # which no kernel adds to less
        out, *saved = leff_forward_native(x, parameters, None, settings, torch.promote_types(dtype, x.dtype))
        return out + residual, *saved
    out = x.new_empty((*x.shape[:2], parameters[2 * parameters_per_layer].shape[0]), dtype=out_dtype)
    prefix = x.to(out_dtype) if settings.num_prefix_tokens else x
    residual = None if residual is None else residual.to(out_dtype)
    parameters, modes, sizes, group = _training_arguments(parameters, settings, dtype)
    saved = kernels._leff_train(x.to(dtype), parameters, residual, prefix, settings.eps, modes, sizes, group, out)
    return out, *saved


def leff_backward_native(
    dout: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    settings: Settings,
    need_x: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The results of ``ceit::leff_backward``, its arguments checked; None for gradients that are not wanted.

    The gradient dout (B, P + H * W, O) of the result is contiguous; saved is what the forward pass returned behind it.
    """
    dtype, prefix = settings.compute_dtype or x.dtype, settings.num_prefix_tokens
    cast, modes, sizes, group = _training_arguments(parameters, settings, dtype)
    bits = sum(1 << i for i, need in enumerate(needs) if need)
    dx, *found = kernels._leff_train_backward(
        dout.to(dtype), x.to(dtype), cast, saved, modes, sizes, group, need_x, bits
    )
    likes = [like for i, like in enumerate(parameters) if i % parameters_per_layer < 4]
    gradients = [g.to(like.dtype) if need else None for g, like, need in zip(found, likes, needs, strict=True)]
    if not need_x:
        return [None, *gradients]
    dx = dx.to(x.dtype)
    if prefix:
        dx[:, :prefix] = dout[:, :prefix]
    return [dx, *gradients]


def _training_arguments(
    parameters: Sequence[Tensor | None], settings: Settings, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[int], list[int], str]:
    """Parameters (those of the pointwise convolutions in the dtype of the GEMMs, all others in that of the
    accumulators), modes of the norms, sizes, and the name of the processes that share statistics.
    """
    acc_dtype = torch.promote_types(dtype, torch.float32)
    of_gemms = (0, 1, 2 * parameters_per_layer, 2 * parameters_per_layer + 1)
    cast = [
        None if parameter is None else parameter.to(dtype if i in of_gemms else acc_dtype).contiguous()
        for i, parameter in enumerate(parameters)
    ]
    sizes = [*(INDICES[name] for name in settings.activations), settings.height, settings.width]
    return cast, [NORM_MODES.index(norm) for norm in settings.norms], sizes, settings.group or ""
