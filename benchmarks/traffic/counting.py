"""Counting the kernels of a call: fused ones from their recorded launches, PyTorch's own as they are dispatched.

Nothing runs: the tensors are fake, they have shapes and no memory, and no GPU is needed. Fake tensors say that they are
on the CPU, because PyTorch's autograd wants a GPU for others; what is counted is what a GPU would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ceit_kernels.common.launch import Launch, record_launches

from .access import launch_bytes, launch_flops, tensor_bytes, touched_again


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    Attributes:
        name: the Triton kernel's, or that of PyTorch's operator.
        bytes: device memory that it reads and writes.
        flops: of its matmuls and convolutions.
        fused: whether it is a kernel of this project.
    """

    name: str
    bytes: int
    flops: int
    fused: bool


@dataclass
class Call:
    """The kernels of a call.

    Attributes:
        forward: kernels in the order of their launches.
        backward: likewise, for the gradients; none at inference.
        saved_bytes: what forward keeps for backward, parameters left out; None where it is not known.
    """

    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    saved_bytes: int | None = None

    @property
    def kernels(self) -> list[Kernel]:
        """Those of both."""
        return self.forward + self.backward


_aten = torch.ops.aten
# Operators that move nothing though their schema does not say that they return a view.
_FREE = {
    _aten._unsafe_view,
    _aten.set_,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
# In-place operators that do not read what they overwrite.
_OVERWRITING = {_aten.copy_, _aten.fill_, _aten.zero_}


class FlashAttention(TorchFunctionMode):
    """Attention as a GPU does it in half precision, which PyTorch does not choose by itself for a fake tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _flash_attention(*args, **(kwargs or {}))


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    if attn_mask is not None:  # which that kernel does not take
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
    return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


class _Counter(TorchDispatchMode):
    """Appends a ``Kernel`` for all that is dispatched to the list ``kernels``, which may be replaced at any time."""

    def __init__(self, chip: int) -> None:
        super().__init__()
        self._chip = chip
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "ceit" and func.has_kernel_for_dispatch_key(DispatchKey.CompositeExplicitAutograd):
            # A fake tensor would call the operator's fake, which launches nothing.
            with record_launches(self._chip) as launches, self:
                out = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            self.kernels += map(_fused, launches)
            return out
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace != "prim" and not func.is_view and packet not in _FREE:
            reads = args[1:] if packet in _OVERWRITING else (args, kwargs)
            moved = _bytes(reads) + _bytes(out)
            if moved:
                flops = operator_flops(func, args, kwargs, out)
                moved += touched_again(packet, args)
                self.kernels.append(Kernel(str(packet), moved, flops, fused=func.namespace == "ceit"))
        return out


def _fused(launch: Launch) -> Kernel:
    return Kernel(launch.kernel.__name__, launch_bytes(launch), launch_flops(launch), fused=True)


def _bytes(tree: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def operator_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one of PyTorch's operators, 0 for one without matmuls and convolutions."""
    packet = func._overloadpacket
    if packet is _aten.convolution_backward:
        # PyTorch's own formula takes the gradient of a grouped convolution's weight for that of a full one.
        grad_out, x, weight, _, *settings = args
        settings, gradients = settings[:-1], settings[-1][:2]
        return sum(gradients) * flop_registry[_aten.convolution](x, weight, None, *settings, out_val=grad_out)
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


@contextmanager
def fake_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> Iterator[nn.Module]:
    """A module of fake tensors of a dtype, and a block in which new tensors are fake as well."""
    with torch.device("meta"):
        module = make().to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield module.to_empty(device="cpu")


@contextmanager
def counted_operators() -> Iterator[list[Kernel]]:
    """A block of which PyTorch's operators are counted, each as one kernel."""
    with _Counter(90) as counter:
        yield counter.kernels


def count_call(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    input_gradient: bool = True,
    chip: int = 90,
) -> Call:
    """Count the kernels of a module's call, by the backends that ``use_backend`` set.

    A fused operator counts by its launches (``access``), those of an eager call: compiled ones take another launch to
    average running statistics, which otherwise goes with the last statistics and is not in the bytes. An operator of
    PyTorch counts as one kernel that reads its inputs and writes its outputs once, views and allocations as none,
    attention as flash attention.

    Args:
        make: makes the module; called where new tensors are on the meta device.
        shape: of the input.
        dtype: of the input, the parameters and the buffers.
        training: count forward and backward of a training step, in place of a forward call at inference.
        input_gradient: whether a training step needs the input's gradient.
        chip: compute capability, times ten, of the GPU that the launches are for.

    Raises:
        LookupError: a launched kernel has no entry in ``access.KERNELS``.
        BackendError: the backend that was asked for cannot serve the call.
    """
    call, counter = Call(), _Counter(chip)
    with fake_model(make, dtype) as module, record_launches(chip), FlashAttention():
        module.train(training)
        x = torch.empty(shape, dtype=dtype, requires_grad=training and input_gradient)
        counter.kernels = call.forward
        if not training:
            with torch.no_grad(), counter:
                module(x)
            return call
        # The blocks of the model take a shorter way with tensors that are not fake.
        with counter, mock.patch("ceit.blocks.is_eager", return_value=True):
            with SavedTensors(module) as saved:
                out = module(x)
            counter.kernels = call.backward
            out.backward(torch.empty(out.shape, dtype=out.dtype))
        call.saved_bytes = saved.bytes()
    return call


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Sees what autograd keeps for backward in a `with` block: a storage once, parameters and buffers left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self._kept: dict[int, int] = {}

    def __enter__(self) -> SavedTensors:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage.nbytes()
        return tensor

    def bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(self._kept.values())
