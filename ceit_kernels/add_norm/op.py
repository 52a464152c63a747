"""``ceit::add_norm`` and its backward: schema, checks, autograd, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.autocast import is_autocast_enabled
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import no_flops, register_flops
from ..common.registration import (
    is_eager,
    loop_over_batch,
    refuse_gradient,
    register_autocast,
    unsupported_reason,
)
from .cpu import add_norm_backward_cpu, add_norm_forward_cpu
from .reference import add_layer_norm_reference

__all__ = ["add_layer_norm"]

_MAX_CHANNELS, _MAX_ROWS = 4096, 2**31 - 4096  # a row is held in registers; rows are counted in 32 bits

torch.library.define(
    "ceit::add_norm",
    "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, int num_prefix_tokens, "
    "ScalarType? out_dtype, str backend) -> (Tensor total, Tensor out, Tensor prefix, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::add_norm_backward",
    "(Tensor grad_out, Tensor? grad_total, Tensor? grad_prefix, Tensor total, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, bool need_input, bool need_weight, bool need_bias, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    num_prefix_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """A residual connection and the LayerNorm behind it: ``total = x + branch`` and ``layer_norm(total)``.

    Use the returned sum, not ``x``, for all that follows: its gradient is then added in the pass that takes the norm's
    gradient. That holds without a branch too, where the sum is ``x``, and for the prefix tokens (class tokens), whose
    gradient would otherwise cost several passes. Differentiable once (any number of times by the reference).

    Args:
        x: (..., C).
        branch: of the shape of x, added to it; nothing if None.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: added to the variance.
        num_prefix_tokens: return the first tokens of the sum as well, for x of shape (B, N, C).

    Returns:
        The sum (..., C) and its LayerNorm (..., C), with ``num_prefix_tokens`` also the sum's first tokens (B, P, C).
        The LayerNorm has the dtype that ``torch.nn.functional.layer_norm`` gives it, which under autocast on a GPU is
        float32.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        BackendError: the backend that was asked for cannot serve the call.
    """
    prefix_tokens = num_prefix_tokens or 0
    total_dtype = _total_dtype(x, branch)
    out_dtype = _autocast_dtype(x, total_dtype)
    some_prefix = x.dim() == 3 and 0 < prefix_tokens <= x.shape[1]
    if not (_all_alike(x, branch, weight, bias) and (some_prefix or not prefix_tokens)):
        _check(x, branch, weight, bias, prefix_tokens, out_dtype)
    limit = _limit(x) or unsupported_reason(x, branch, weight, bias)
    choice = backends.choose("add_norm", x, total_dtype, limit, "training")
    if choice.backend == "reference":
        total, out = add_layer_norm_reference(x, branch, weight, bias, eps)
        prefix = total[:, :prefix_tokens] if prefix_tokens else None
    else:
        settings = (weight, bias, eps, prefix_tokens, out_dtype, choice.backend)
        total, out, prefix = _call(x, branch, *settings)
    if num_prefix_tokens is None:
        return total, out
    return total, out, prefix if prefix_tokens else total[:, :0]


def _call(x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend) -> tuple[Tensor | None, ...]:
    """The sum, which is x without a branch, its LayerNorm and its prefix tokens; the arguments are checked."""
    arguments = (x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend)
    eager = backend == "native" and is_eager(x)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4])
    if training and (eager or branch is None):
        return _AddNorm.apply(*arguments)
    if eager:
        total, out, prefix, _, _ = _forward_checked(*arguments, with_statistics=False)
    else:
        total, out, prefix, _, _ = torch.ops.ceit.add_norm(*arguments)
    return x if branch is None else total, out, prefix


def _total_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    if branch is None or branch.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, branch.dtype)


def _autocast_dtype(x: Tensor, total_dtype: torch.dtype) -> torch.dtype | None:
    """What layer_norm returns under autocast; None where autocast is off."""
    device_type = "cuda" if x.is_cuda else x.device.type
    if not is_autocast_enabled(device_type):
        return None
    # On CUDA it is one of the operators that run in float32; on a CPU it takes what it is given.
    return torch.float32 if x.is_cuda and total_dtype != torch.float64 else total_dtype


def _all_alike(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the arguments are what they mostly are, which is quicker to tell than whether they are allowed."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or not shape[-1] or not dtype.is_floating_point:
        return False
    if branch is not None and (branch.shape != shape or branch.dtype != dtype or branch.device != device):
        return False
    row = shape[-1:]
    return all(p is None or (p.shape == row and p.dtype == dtype and p.device == device) for p in (weight, bias))


def _check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_prefix_tokens: int,
    out_dtype: torch.dtype | None,
) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., C) with at least one channel, got {tuple(x.shape)}")
    check_floating("x", x)
    if branch is not None:
        check_shape("branch", branch, *x.shape)
        check_floating("branch", branch)
        check_device("branch", branch, x, "x")
    total_dtype = _total_dtype(x, branch)
    parameters = [(name, tensor) for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
    # As plain PyTorch takes them on the CPU.
    wide = total_dtype.itemsize == 2 and not x.is_cuda and all(p.dtype == torch.float32 for _, p in parameters)
    for name, parameter in parameters:
        check_shape(name, parameter, x.shape[-1])
        check_floating(name, parameter)
        check_device(name, parameter, x, "x")
        if out_dtype is None and not wide:
            check_dtype(name, parameter, total_dtype, "x" if branch is None else "x + branch")
    if num_prefix_tokens:
        check_shape("x", x, "B", "N", "C")
        if not 0 < num_prefix_tokens <= x.shape[1]:
            raise ValueError(
                f"num_prefix_tokens: expected at most the {x.shape[1]} tokens of x, got {num_prefix_tokens}"
            )


def _limit(x: Tensor) -> str | None:
    channels = x.shape[-1]
    if channels > _MAX_CHANNELS:
        return f"the kernels take up to {_MAX_CHANNELS} channels, x has {channels}"
    rows = x.numel() // channels
    # A graph is for any number of rows; the operator in it looks again.
    if not torch.compiler.is_compiling() and rows > _MAX_ROWS:
        return f"the kernels take up to {_MAX_ROWS} rows, x has {rows}"
    return None


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _outputs(make, x, branch, num_prefix_tokens, out_dtype) -> tuple[Tensor, ...]:
    """Tensors like the results of the forward operator, which have no element where there is nothing to return."""
    dtype = _total_dtype(x, branch)
    wide = torch.promote_types(dtype, torch.float32)
    prefix = (x.shape[0], num_prefix_tokens, x.shape[2]) if num_prefix_tokens else (0,)
    return (
        make((0,) if branch is None else x.shape, dtype=dtype),
        make(x.shape, dtype=out_dtype or dtype),
        make(prefix, dtype=dtype),
        *(make(x.shape[:-1], dtype=wide) for _ in range(2)),
    )


def _forward_checked(
    x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend, with_statistics=True
) -> tuple[Tensor | None, ...]:
    dtype = _total_dtype(x, branch)
    if x.numel() == 0:
        return _outputs(x.new_zeros, x, branch, num_prefix_tokens, out_dtype)
    if backend == "native":
        dtypes = (dtype, out_dtype or dtype)
        return add_norm_forward_cpu(x, branch, weight, bias, eps, num_prefix_tokens, *dtypes, with_statistics)
    from .triton.launch import add_norm_forward_triton

    tensors = _contiguous(x, branch, weight, bias)
    return add_norm_forward_triton(*tensors, eps, num_prefix_tokens, out_dtype or dtype)


@torch.library.impl("ceit::add_norm", "default")
def _forward(x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend):
    _check(x, branch, weight, bias, num_prefix_tokens, out_dtype)
    dtype = _total_dtype(x, branch)
    backends.require("add_norm", backend, x, dtype, _limit(x))
    results = _forward_checked(x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend)
    # An operator must return tensors.
    return tuple(x.new_empty(0, dtype=dtype) if result is None else result for result in results)


@torch.library.register_fake("ceit::add_norm")
def _forward_fake(x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend):
    _check(x, branch, weight, bias, num_prefix_tokens, out_dtype)
    return _outputs(x.new_empty, x, branch, num_prefix_tokens, out_dtype)


def _empty_gradients(make, total, weight, bias, needs) -> tuple[Tensor, ...]:
    """Gradients of the right shape; one that is not needed has no element, because an operator must return tensors."""
    return tuple(
        make(tensor, memory_format=torch.contiguous_format) if need else total.new_empty(0)
        for tensor, need in zip((total, weight, bias), needs, strict=True)
    )


def _backward_checked(
    grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, *rest
) -> tuple[Tensor | None, ...]:
    *needs, backend = rest
    if total.numel() == 0:
        return _empty_gradients(torch.zeros_like, total, weight, bias, needs)
    tensors = (grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd)
    if backend == "native":
        return add_norm_backward_cpu(*tensors, *needs)
    from .triton.launch import add_norm_backward_triton

    return add_norm_backward_triton(*_contiguous(*tensors), *needs)


@torch.library.impl("ceit::add_norm_backward", "default")
def _backward(grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, *rest):
    *needs, backend = rest
    backends.require("add_norm", backend, total, total.dtype, _limit(total))
    check_shape("grad_out", grad_out, *total.shape)
    if grad_total is not None:
        check_shape("grad_total", grad_total, *total.shape)
    if grad_prefix is not None:
        check_shape("grad_prefix", grad_prefix, total.shape[0], "P", total.shape[-1])
    for name, parameter, need in (("weight", weight, needs[1]), ("bias", bias, needs[2])):
        if need and parameter is None:
            raise ValueError(f"need_{name}: expected False where {name} is None, got True")
    grads = _backward_checked(grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, *rest)
    return tuple(total.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("ceit::add_norm_backward")
def _backward_fake(grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, *rest):
    return _empty_gradients(torch.empty_like, total, weight, bias, rest[:3])


def _gradients(ctx, grad_total, grad_out, grad_prefix, needs) -> tuple[Tensor | None, ...]:
    """Gradients of the sum, the weight and the bias, None for those that are not needed."""
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if grad_out is None:
        return _gradient_beside_norm(total, grad_total, grad_prefix) if needs[0] else None, None, None
    eager = ctx.backend == "native" and all(g is None or is_eager(g) for g in (grad_out, grad_total, grad_prefix))
    # With gradients on, the operator refuses that of its own.
    run = _backward_checked if eager and not torch.is_grad_enabled() else torch.ops.ceit.add_norm_backward
    arguments = (grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, *needs, ctx.backend)
    found = run(*arguments)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _gradient_beside_norm(total: Tensor, grad_total: Tensor | None, grad_prefix: Tensor | None) -> Tensor | None:
    """The sum's gradient where nothing uses its norm."""
    if grad_prefix is None:
        return grad_total
    grad = torch.zeros_like(total) if grad_total is None else grad_total.clone()
    grad[:, : grad_prefix.shape[1]] += grad_prefix
    return grad


def _save(ctx, total, weight, bias, mean, rstd, backend) -> None:
    ctx.save_for_backward(total, weight, bias, mean, rstd)
    ctx.backend = backend
    # Or backward would get, and add, zeros for a sum that nothing else uses.
    ctx.set_materialize_grads(False)


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, _, num_prefix_tokens, _, backend = inputs
    total, _, _, mean, rstd = output
    _save(ctx, x if branch is None else total, weight, bias, mean, rstd, backend)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.has_prefix = num_prefix_tokens > 0


def _autograd_backward(ctx, grad_total, grad_out, grad_prefix, *no_grads):
    return _input_gradients(
        ctx, None if ctx.dtypes[1] is None else grad_total, grad_out, grad_prefix if ctx.has_prefix else None
    )


def _input_gradients(ctx, grad_total, grad_out, grad_prefix) -> tuple[Tensor | None, ...]:
    need_x, need_branch, *need_parameters = ctx.needs_input_grad[:4]
    dtype, branch_dtype = ctx.dtypes
    needs = (need_x or need_branch, *need_parameters)
    grad, grad_weight, grad_bias = _gradients(ctx, grad_total, grad_out, grad_prefix, needs)
    return (
        grad.to(dtype) if need_x and grad is not None else None,
        grad.to(branch_dtype) if need_branch and grad is not None else None,
        grad_weight,
        grad_bias,
        *(None,) * 4,  # eps, num_prefix_tokens, out_dtype, backend
    )


torch.library.register_autograd("ceit::add_norm", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::add_norm_backward",
    "ceit_kernels.add_layer_norm is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference")',
)
loop_over_batch("ceit::add_norm_backward")


class _AddNorm(torch.autograd.Function):
    """The operator with x itself as the sum where there is no branch: a registered operator may not return its input.

    Outside a graph the native backend spares itself what a registered operator costs a call.
    """

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor | None, *settings) -> tuple[Tensor | None, ...]:
        weight, bias, _, num_prefix_tokens, _, backend = settings
        eager = backend == "native" and is_eager(x)
        run = _forward_checked if eager else torch.ops.ceit.add_norm
        total, out, prefix, mean, rstd = run(x, branch, *settings)
        _save(ctx, x if branch is None else total, weight, bias, mean, rstd, backend)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        return x.view_as(x) if branch is None else total, out, prefix if num_prefix_tokens else None

    @staticmethod
    def backward(ctx, grad_total, grad_out, grad_prefix) -> tuple[Tensor | None, ...]:
        return _input_gradients(ctx, grad_total, grad_out, grad_prefix)


@register_autocast("ceit::add_norm")
def _autocast(dtype, x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend):
    out_dtype = out_dtype or _autocast_dtype(x, _total_dtype(x, branch)) or _total_dtype(x, branch)
    return torch.ops.ceit.add_norm(x, branch, weight, bias, eps, num_prefix_tokens, out_dtype, backend)


for _operator in ("ceit::add_norm", "ceit::add_norm_backward"):
    register_flops(_operator)(no_flops)
