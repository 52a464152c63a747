"""Training of an encoder block on the CPU: one compiled call forward and one backward (csrc/cpu/block/training.cpp).

Operator by operator a block takes four milliseconds of Python in a training step, while the other threads wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..attention import FusedAttention
from ..common.autocast import autocast_dtype
from ..common.calls import foreign_reason, is_eager, needs_gradient, unsupported_reason
from ..common.children import child_reason
from ..common.operator import Operator, gradients_like
from ..leff import FusedLeFF
from ..leff.activations import INDICES
from ..leff.arguments import NORM_MODES, PARAMETER_NAMES
from ..leff.functional import pack
from ..leff.grid import token_grid
from ..leff.norms import BatchNorm, norm_mode, process_group_of, update_running_statistics
from .arguments import attention_tensors
from .encoder import OPERATORS, EncoderParts

__all__ = ["encoder_training", "encoder_training_operator"]

_ATTENTION_NAMES = tuple(
    f"{layer}_{name}" for layer in ("norm1", "qkv", "proj", "norm2") for name in ("weight", "bias")
)
_NAMES = (*_ATTENTION_NAMES, *(f"leff_{name}" for name in PARAMETER_NAMES))
_SAVED = tuple(f"saved{i}" for i in range(14))
# Those that may have a gradient: all but LeFF's running statistics.
_DIFFERENTIABLE = tuple(i for i, name in enumerate(_NAMES) if "running" not in name)

torch.library.define(
    "ceit::_encoder_train",
    "(Tensor x, Tensor?[] parameters, Tensor? factor1, Tensor? factor2, float[] scalars, int[] sizes, "
    "bool in_bfloat16, Tensor(a!) out) -> Tensor[]",
)
torch.library.define(
    "ceit::_encoder_train_backward",
    "(Tensor grad_out, Tensor? grad_class, Tensor x, Tensor?[] parameters, Tensor? factor1, Tensor? factor2, "
    "Tensor[] saved, float[] scalars, int[] sizes, bool in_bfloat16, bool need_x, int needs) -> Tensor[]",
)
_train, _train_backward = torch.ops.ceit._encoder_train.default, torch.ops.ceit._encoder_train_backward.default


class _EncoderTraining(Operator):
    """An eager call passes LeFF's norms, whose statistics it averages, in the place of the backend."""

    name, operator = "encoder_block", "leff"
    differentiable = returned = 2
    _inputs = f"Tensor x, Tensor? factor1, Tensor? factor2, {', '.join(f'Tensor? {name}' for name in _NAMES)}"
    schema = (
        f"({_inputs}, float[] scalars, int[] sizes, bool in_bfloat16, str backend) "
        f"-> (Tensor out, Tensor class_token, {', '.join(f'Tensor {name}' for name in _SAVED)})"
    )
    backward_schema = (
        f"(Tensor grad_out, Tensor? grad_class, {_inputs}, {', '.join(f'Tensor {name}' for name in _SAVED)}, "
        "float[] scalars, int[] sizes, bool in_bfloat16, bool[] needs) "
        f"-> ({', '.join(['Tensor'] * (1 + len(_DIFFERENTIABLE)))})"
    )
    public_name = "ceit.blocks.Block"

    def forward(self, x, factor1, factor2, *inputs):
        *parameters, scalars, sizes, in_bfloat16, norms = inputs
        out = x.new_empty(x.shape)
        saved = _train(x, parameters, factor1, factor2, scalars, sizes, in_bfloat16, out)
        if not isinstance(norms, str):
            tokens = x.shape[0] * sizes[3] * sizes[4]
            update_running_statistics(norms, saved[-4:-1], saved[-1], tokens, "native")
        return out, x[:, :1].clone(), *saved

    def autocast(self, dtype, *inputs):
        return inputs

    def fake(self, x, factor1, factor2, *inputs):
        *parameters, _, sizes, in_bfloat16, _ = inputs
        (images, rows, channels), heads, tokens = x.shape, sizes[0], sizes[3] * sizes[4]
        hidden, modes = parameters[len(_ATTENTION_NAMES)].shape[0], sizes[5:]
        widths = (channels, 3 * channels, channels, channels, channels)
        dtypes = [torch.bfloat16 if in_bfloat16 and i != 3 else x.dtype for i in range(len(widths))]
        norms = (x.new_empty((5, n) if mode else 0) for mode, n in zip(modes, (hidden, hidden, channels), strict=True))
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format),
            x.new_empty((images, 1, channels)),
            *(x.new_empty((images, rows, n), dtype=dtype) for n, dtype in zip(widths, dtypes, strict=True)),
            x.new_empty((images, heads, rows, 2)),
            x.new_empty((4, images * rows)),
            x.new_empty((images * rows, hidden), dtype=dtypes[0]),
            x.new_empty((images * tokens, hidden), dtype=dtypes[0]),
            x.new_empty((images * tokens, channels) if modes[2] else 0, dtype=dtypes[0]),
            *norms,
            x.new_empty(1 if NORM_MODES.index("batch") in modes else 0),
        )

    def save(self, ctx, inputs, results):
        *tensors, ctx.scalars, ctx.sizes, ctx.in_bfloat16, _ = inputs
        x, factor1, factor2, *parameters = tensors
        # Running statistics are written before backward, which does not read them.
        kept = [p if i in _DIFFERENTIABLE else None for i, p in enumerate(parameters)]
        ctx.save_for_backward(x, factor1, factor2, *kept, *results[2:])

    def gradients(self, backward, ctx, grad_out, grad_class, *_):
        need_x, _, _, *need = ctx.needs_input_grad[: 3 + len(_NAMES)]
        needs = [need_x, *(need[i] for i in _DIFFERENTIABLE)]
        x, *saved = ctx.saved_tensors
        grad_out = x.new_zeros(x.shape) if grad_out is None else grad_out
        found = backward(grad_out, grad_class, x, *saved, ctx.scalars, ctx.sizes, ctx.in_bfloat16, needs)
        gradients: list[Tensor | None] = [found[0], None, None, *(None for _ in _NAMES)]
        for i, gradient in zip(_DIFFERENTIABLE, found[1:], strict=True):
            gradients[3 + i] = gradient
        return gradients

    def backward(self, grad_out, grad_class, x, factor1, factor2, *inputs):
        *tensors, scalars, sizes, in_bfloat16, (need_x, *needs) = inputs
        parameters, saved = tensors[: len(_NAMES)], tensors[len(_NAMES) :]
        bits = sum(1 << i for i, need in enumerate(needs) if need)
        grad_class = None if grad_class is None else grad_class.contiguous()
        factors, settings = (factor1, factor2), (scalars, sizes, in_bfloat16)
        found = _train_backward(
            grad_out.contiguous(), grad_class, x, parameters, *factors, saved, *settings, need_x, bits
        )
        return tuple(grad if need else None for grad, need in zip(found, (need_x, *needs), strict=True))

    def fake_backward(self, grad_out, grad_class, x, factor1, factor2, *inputs):
        tensors = (x, *(inputs[i] for i in _DIFFERENTIABLE))
        return gradients_like(tensors, inputs[-1], torch.empty_like)


encoder_training_operator = _EncoderTraining()


def encoder_training(
    x: Tensor,
    parts: EncoderParts | None,
    grid_size: tuple[int, int] | None = None,
    make_factor: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The tokens (B, P + H * W, C) behind a block, and the first token (B, 1, C) of x, with their gradients.

    Computes ``y = x + factor1 * attention(norm1(x)); y + factor2 * leff(norm2(y))`` in float32 and float64, and keeps
    the running statistics of LeFF's norms. Under autocast in bfloat16 tokens stay in float32, and what the GEMMs take
    is rounded.

    None where that takes other calls: no gradient is wanted, autocast in float16, a hook, compiler or dispatch mode is
    active, a module is not the fused or plain one that is known, an operator does not run natively, dropout, or norms
    over several processes.

    Args:
        x: tokens (B, P + H * W, C) on the CPU.
        parts: the children that do all that the block does; None for a block that does more.
        grid_size: (H, W); a square if None.
        make_factor: makes the factor (B, 1, 1) of a branch, what stochastic depth makes of ones; called for the first,
            then for the second, if the call is served. None for factors of 1.

    Raises:
        ValueError: the tokens make no such image.
    """
    in_bfloat16 = autocast_dtype(x) is torch.bfloat16 and x.dtype is torch.float32
    if parts is None or not _may_run(x, torch.bfloat16 if in_bfloat16 else None):
        return None
    arguments = _arguments(x, parts, grid_size)
    if arguments is None:
        return None
    parameters, scalars, sizes, norms = arguments
    if not needs_gradient(x, *parameters):
        return None
    factors = (None, None) if make_factor is None else (make_factor(), make_factor())
    tensors = x.contiguous(), *factors, *parameters
    out, class_token = encoder_training_operator.eager(*tensors, scalars, sizes, in_bfloat16, norms)
    return out, class_token


def _may_run(x: Tensor, autocast: torch.dtype | None) -> bool:
    return (
        x.dim() == 3
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and is_eager(x)
        and unsupported_reason(x) is None
        and autocast_dtype(x) is autocast
        and not _has_any_global_hook()
        and all(backends.choose(name, x, autocast or x.dtype).backend == "native" for name in OPERATORS)
    )


def _arguments(
    x: Tensor, parts: EncoderParts, grid_size: tuple[int, int] | None
) -> tuple[list[Tensor | None], list[float], list[int], Sequence[BatchNorm | None]] | None:
    """Parameters, scalars and sizes of the compiled call, and LeFF's norms; None where a module has to be called."""
    norm1, attention, norm2, leff = parts
    channels = x.shape[2]
    if type(leff) is not FusedLeFF or leff.layout != "tokens":
        return None
    found = attention_tensors(norm1, attention, norm2, FusedAttention, channels)
    if found is None or child_reason("leff", leff, (FusedLeFF,)) is not None:
        return None
    leff_parts = leff.training_parts()
    if leff_parts is None:
        return None
    weights, biases, norms, activations = leff_parts
    height, width = token_grid(x.shape[1], leff.num_prefix_tokens, grid_size)
    modes = [norm_mode(norm) for norm in norms]
    hidden = weights[0].shape[0]
    parameters = [*found[0], *pack(weights, biases, norms)]
    square, side = channels * channels, weights[1].shape[-1]
    counts = [channels, channels, 3 * square, 3 * channels, square, channels, channels, channels]
    for weight, outputs in ((channels * hidden, hidden), (side * side * hidden, hidden), (hidden * channels, channels)):
        counts += [weight, *(outputs,) * 5]
    of_one_value = x.shape[0] * height * width == 1 and "batch" in modes
    if of_one_value or process_group_of(norms) != (None, None) or not _are_readable(x, parameters, counts):
        return None
    scalars = [*found[1], *(norm.eps if norm else 0.0 for norm in norms)]
    sizes = [attention.num_heads, *(INDICES[name] for name in activations), height, width]
    return parameters, scalars, [*sizes, *map(NORM_MODES.index, modes)], norms


def _are_readable(x: Tensor, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> bool:
    """Whether compiled code may read tensors of so many elements: contiguous, and of the dtype and device of x."""
    dtype, device = x.dtype, x.device
    for tensor, count in zip(tensors, counts, strict=True):
        if tensor is None:
            continue
        if tensor.dtype is not dtype or tensor.device != device or tensor.numel() != count:
            return False
        if not tensor.is_contiguous():
            return False
    return foreign_reason(*tensors) is None
