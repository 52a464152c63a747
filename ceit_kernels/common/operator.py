"""Registered operators: one class takes an operator's schema and formulas, and makes a callable of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import flop_counter

from .. import backends
from .calls import are_eager, is_eager, needs_gradient

__all__ = ["Operator", "contiguous", "gradients_like"]

Results = Any  # a tensor, or a tuple with None for tensors that a call does not have

_LIBRARY = torch.library.Library("ceit", "FRAGMENT")
_CPU, _CUDA = torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA
_AUTOCAST = torch._C.DispatchKeySet(_CPU) | torch._C.DispatchKeySet(_CUDA)


class Operator:
    """The operator ``ceit::<name>`` and its gradient ``ceit::<name>_backward``, registered when an instance is made.

    An instance is called with checked inputs. In eager mode it runs ``forward`` at once, as an ``autograd.Function`` of
    the same formulas where a gradient is wanted. Compilers, dispatch modes and transforms get the registered operator,
    which takes up to a millisecond a call on the CPU.

    A subclass gives the attributes and formulas, whose ``inputs`` are the arguments of the schema (``options`` only let
    type checkers take any signature of them). Where a call does not have a tensor, formulas return None; the registered
    operator, which must return tensors, returns one without elements.

    Attributes:
        name: what it is registered as.
        operator: what ``backends`` calls it; the name if empty.
        schema: for ``torch.library.define``, with the tensors first and ``str backend`` last.
        backward_schema: likewise of the gradient; empty where there is none.
        differentiable: how many of the results, from the first, have a gradient.
        returned: how many of them, from the first, an eager call with gradients returns; all if None.
        public_name: what users call, for the error of a second derivative.
        twice: where second derivatives are to be had.
        forward, backward: the results, and those of the gradient's operator.
        fake, fake_backward: tensors of the shapes and dtypes of these.
        save: ``save(ctx, inputs, results)`` keeps in ``ctx`` what ``gradients`` needs.
        gradients: ``gradients(backward, ctx, *grads)`` gives those of the first inputs, and those that nobody asked for
            are dropped. ``backward`` is the method or the registered operator; of the results' ``grads`` some may be
            None, but not all.
    """

    name: ClassVar[str]
    operator: ClassVar[str] = ""
    schema: ClassVar[str]
    backward_schema: ClassVar[str] = ""
    differentiable: ClassVar[int] = 1
    returned: ClassVar[int | None] = None
    public_name: ClassVar[str]
    twice: ClassVar[str] = 'ceit_kernels.use_backend("reference")'
    forward: ClassVar[Callable[..., Results]]
    fake: ClassVar[Callable[..., Results]]
    backward: ClassVar[Callable[..., Results]]
    fake_backward: ClassVar[Callable[..., Results]]
    save: ClassVar[Callable[..., None]]
    gradients: ClassVar[Callable[..., Sequence[Tensor | None]]]

    def check(self, *inputs: Any, **options: Any) -> None:
        """Raise ValueError or TypeError for inputs, without the backend, that make no call."""

    def unsupported(self, *inputs: Any, **options: Any) -> str | None:
        """Why the sizes of the inputs, without the backend, are beyond the kernels; None if they are not."""

    def compute_dtype(self, *inputs: Any, **options: Any) -> torch.dtype:
        """What a call computes in: what the argument ``compute_dtype`` says, by default the dtype of the first."""
        place = self._compute_dtype
        return (None if place is None else inputs[place]) or inputs[0].dtype

    def flops(self, *inputs: Any, **options: Any) -> int:
        """FLOPs of ``forward``, with shapes in the place of tensors."""
        return 0

    def autocast(self, dtype: torch.dtype, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The inputs under autocast in ``dtype``. Kernels round what they load: that costs no cast of its own."""
        place = self._compute_dtype
        chosen = inputs[place] or (None if inputs[0].dtype == torch.float64 else dtype)
        return *inputs[:place], chosen, *inputs[place + 1 :]

    def check_backward(self, *inputs: Any, **options: Any) -> None:
        """Raise ValueError or TypeError for inputs of ``backward`` that make no call."""

    def backward_flops(self, *inputs: Any, **options: Any) -> int:
        """FLOPs of ``backward``, with shapes in the place of tensors."""
        return 0

    def __init__(self) -> None:
        self.registered = _define(self.name, self.schema, self._checked_forward, self._checked_fake, self.flops)
        arguments = self.registered._schema.arguments
        names = [argument.name for argument in arguments]
        self._compute_dtype = names.index("compute_dtype") if "compute_dtype" in names else None
        self._tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        _LIBRARY.impl(self.name, self._autocast_kernel("cpu", _CPU), "AutocastCPU")
        _LIBRARY.impl(self.name, self._autocast_kernel("cuda", _CUDA), "AutocastCUDA")
        if not self.backward_schema:
            _refuse_gradient(self.name, f"ceit::{self.name} has no gradient, call {self.public_name}")
            return
        self.function = _function(self)
        name = f"{self.name}_backward"
        self.registered_backward = _define(
            name, self.backward_schema, self._checked_backward, self._checked_fake_backward, self.backward_flops
        )
        torch.library.register_autograd(
            f"ceit::{self.name}",
            lambda ctx, *grads: self.input_gradients(self.registered_backward, ctx, *grads),
            setup_context=self.setup_context,
        )
        _refuse_gradient(
            name, f"{self.public_name} is differentiable once; for second derivatives run it under {self.twice}"
        )
        _loop_over_batch(name, self.registered_backward)

    def __call__(self, *inputs: Any) -> Results:
        """The results of checked inputs, in eager mode with gradients the first of them (``returned``)."""
        return self.eager(*inputs) if is_eager(inputs[0]) else self.registered(*inputs)

    def eager(self, *inputs: Any) -> Results:
        """The results in eager mode."""
        if torch.is_grad_enabled() and needs_gradient(*inputs[: self._tensors]):
            return self.function.apply(*inputs)
        return self.run(*inputs)

    def run(self, *inputs: Any) -> Results:
        """``forward`` with autocast out of the way."""
        if not torch._C._is_any_autocast_enabled():
            return self.forward(*inputs)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self.forward(*inputs)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Results, returned: int | None = None) -> None:
        """Prepare ``ctx`` for ``input_gradients``."""
        # Or zeros would be made in the place of gradients that are not there.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple) and (rest := output[self.differentiable : returned]):
            ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        self.save(ctx, inputs, output)

    def input_gradients(
        self, backward: Callable[..., Results], ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, None for those that are not needed; arguments as of ``gradients``."""
        needs = ctx.needs_input_grad
        found = self.gradients(backward, ctx, *grads) if any(grad is not None for grad in grads) else ()
        return tuple([grad if need else None for grad, need in zip_longest(found, needs)])

    def backward_of_function(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """``input_gradients`` by the method ``backward``, or the registered operator where that is needed."""
        # The gradient of this gradient is to be refused, or gradients come in batches.
        eager = not torch.is_grad_enabled() and are_eager(grads)
        return self.input_gradients(self.backward if eager else self.registered_backward, ctx, *grads)

    def _checked_forward(self, *inputs: Any) -> Results:
        *given, backend = inputs
        self.check(*given)
        name, dtype = self.operator or self.name, self.compute_dtype(*inputs)
        backends.require(name, backend, inputs[0], dtype, self.unsupported(*given))
        return _tensors(self.forward(*inputs), inputs[0])

    def _checked_fake(self, *inputs: Any) -> Results:
        self.check(*inputs[:-1])
        return _tensors(self.fake(*inputs), inputs[0])

    def _checked_backward(self, *inputs: Any) -> Results:
        self.check_backward(*inputs)
        return _tensors(self.backward(*inputs), inputs[0])

    def _checked_fake_backward(self, *inputs: Any) -> Results:
        self.check_backward(*inputs)
        return _tensors(self.fake_backward(*inputs), inputs[0])

    def _autocast_kernel(self, device_type: str, key: Any) -> Callable[..., Results]:
        # ``torch.library.register_autocast`` can only cast every input.
        def kernel(*inputs: Any) -> Results:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return self.registered(*self.autocast(torch.get_autocast_dtype(device_type), *inputs))

        return kernel


def gradients_like(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], make: Callable[..., Tensor] = torch.empty_like
) -> tuple[Tensor | None, ...]:
    """Contiguous tensors for the gradients of others, None for those that are not needed."""
    return tuple(
        make(tensor, memory_format=torch.contiguous_format) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where they are not contiguous."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _define(
    name: str, schema: str, forward: Callable[..., Results], fake: Callable[..., Results], flops: Callable[..., int]
) -> Any:
    """Register an operator; what calls it."""
    qualified = f"ceit::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", forward)
    torch.library.register_fake(qualified, fake)
    packet = getattr(torch.ops.ceit, name)
    flop_counter.register_flop_formula(packet)(flops)
    return packet.default


def _tensors(results: Results, like: Tensor) -> Results:
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _function(operator: Operator) -> type[torch.autograd.Function]:
    """The operator outside any graph."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Results:
            results = operator.run(*inputs)
            operator.setup_context(ctx, inputs, results, operator.returned)
            return results if isinstance(results, Tensor) else results[: operator.returned]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return operator.backward_of_function(ctx, *grads)

    return Function


def _refuse_gradient(name: str, message: str) -> None:
    """Make the gradient of an operator an error, which without any formula would be dropped in silence."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(message)

    torch.library.register_autograd(f"ceit::{name}", backward, setup_context=lambda ctx, inputs, output: None)


def _loop_over_batch(name: str, operator: Any) -> None:
    """Let ``torch.func.vmap`` call a backward operator for every element of a batch of gradients."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Any, Any]:
        placed = list(zip(inputs, in_dims, strict=True))
        results = [
            operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in placed))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"ceit::{name}", rule)
