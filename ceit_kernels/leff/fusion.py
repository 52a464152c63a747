"""What all fused modules of the block share, CeiT's and other libraries': where their parts are, and their calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from .. import backends
from ..common.children import Classes, children_reason, convolution_reason, held
from ..common.freezing import Prepacked, is_freezable, is_frozen_call, prepack_module
from ..common.module import Fusion, attributes_of, is_made
from ..common.sync_norm import BATCH_NORMS
from .activations import MODULES, activation_name
from .arguments import NORM_TENSORS, kernel_size_unsupported_reason
from .cpu import in_compute_dtype, kernels, leff_sizes
from .functional import leff_fused, pack
from .grid import empty_tokens_like, from_tokens, in_memory_order, is_planar, residual_to_tokens, to_tokens
from .norms import of_module

__all__ = ["NORMS", "BlockFusion", "BlockParts", "FrozenBlock"]

# Norms that call an activation, their child; others that got such a child do not.
_NORMS_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")
NORMS = (*BATCH_NORMS, nn.Identity, *_NORMS_WITH_ACTIVATION)
_OF_NORM = (*NORM_TENSORS, "num_batches_tracked")


@dataclass(frozen=True)
class BlockParts:
    """Where a class keeps the parts of the block, as paths of children ("dwconv.conv").

    Attributes:
        layers: the pointwise layer, the depthwise convolution and the pointwise layer.
        norms: behind each layer; None where there is none.
        activations: behind the first and the second layer; None where there is none.
        dropouts: which must be idle.
        wrappers: children on the way to these, with their classes.
        pointwise: the classes of the pointwise layers.
    """

    layers: tuple[str, str, str]
    norms: tuple[str | None, str | None, str | None] = (None, None, None)
    activations: tuple[str | None, str | None] = (None, None)
    dropouts: tuple[str, ...] = ()
    wrappers: Mapping[str, Classes] = field(default_factory=dict)
    pointwise: Classes = (nn.Conv2d,)

    def __post_init__(self) -> None:
        _ = (
            self.tensor_names,
            self.children,
        )  # compilers do not see through a cached property that is yet to be computed

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """What messages call the tensors, in the order of ``arguments.PARAMETER_NAMES``."""
        return tuple(
            name
            for layer, norm in zip(self.layers, self.norms, strict=True)
            for name in (f"{layer}.weight", f"{layer}.bias", *(f"{norm}.{tensor}" for tensor in NORM_TENSORS))
        )

    @cached_property
    def children(self) -> dict[str, dict[str, Classes]]:
        """The classes of each child, by the path of what it is a child of."""
        classes = {
            **self.wrappers,
            **dict.fromkeys((self.layers[0], self.layers[2]), self.pointwise),
            self.layers[1]: (nn.Conv2d,),
            **{norm: NORMS for norm in self.norms if norm},
            **{activation: MODULES for activation in self.activations if activation},
            **{norm: _NORMS_WITH_ACTIVATION for norm in self.norms if f"{norm}.act" in self.activations},
            **dict.fromkeys(self.dropouts, (nn.Dropout, nn.Identity)),
        }
        found: dict[str, dict[str, Classes]] = {}
        for path, expected in classes.items():
            parent, _, name = path.rpartition(".")
            found.setdefault(parent, {})[name] = expected
        return dict(sorted(found.items()))


def child_at(module: nn.Module, path: str) -> Any:
    """A child's child's child, which takes a fraction of the time of ``get_submodule``."""
    for name in path.split("."):
        module = cast("nn.Module", module._modules[name])
    return module


class BlockFusion(Fusion, attributes_of(nn.Module)):
    """Base of fused modules that are a pointwise layer, a depthwise convolution and a pointwise layer.

    A subclass has ``parts``, and a ``forward`` with the arguments of the plain class's that returns what
    ``_by_operator`` does and, where that is None, ``super().forward(...)``.
    """

    parts: ClassVar[BlockParts]

    def _by_operator(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        residual: Tensor | None = None,
        layout: str = "tokens",
        num_prefix_tokens: int = 0,
    ) -> Tensor | None:
        """The result of ``leff_block``; None for a call that is left to the plain ``forward``."""
        reason = self.plain_reason()
        if reason is not None:
            backends.leave_to_reference("leff", reason)
            return None
        if self._kernel_stride() != 1:
            return self._strided(x)
        where = self._activations(), grid_size, num_prefix_tokens, residual, layout
        return leff_fused(x, *self._tensors(), *where, self.parts.tensor_names)

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        parts = self.parts
        for path, expected in parts.children.items():
            own = _OF_NORM if path in parts.norms else ()
            reason = children_reason(child_at(self, path) if path else self, expected, own)
            if reason is not None:
                return reason
        for path in parts.dropouts:
            dropout = child_at(self, path)
            if dropout.training and type(dropout) is nn.Dropout and dropout.p:
                return f"the kernels have no dropout between layers, and {path} has p={dropout.p}"
        for path in parts.activations:
            if path and activation_name(child_at(self, path)) is None:
                return f"the kernels do not know what {path} computes"
        return self._layers_reason()

    def _layers_reason(self) -> str | None:
        layers = self._layers()
        weight1, weight2, weight3 = [held(layer, "weight") for layer in layers]
        shape1, shape2, shape3 = weight1.shape, weight2.shape, weight3.shape
        hidden, side = shape2[0], shape2[-1]
        follow = shape1[0] == hidden and shape2 == (hidden, 1, side, side) and shape3[1] == hidden
        if not (follow and weight1.numel() == hidden * shape1[1] and weight3.numel() == hidden * shape3[0]):
            return "the convolutions are not a pointwise, a depthwise and a pointwise one that follow each other"
        stride = self._kernel_stride()
        pixel, neighbours = ((1, 1), (0, 0), 1), ((stride, stride), (side // 2, side // 2), hidden)
        for path, layer, where in zip(self.parts.layers, layers, (pixel, neighbours, pixel), strict=True):
            reason = None if isinstance(layer, nn.Linear) else convolution_reason(path, layer, *where)
            if reason is not None:
                return reason
        return kernel_size_unsupported_reason(weight2)

    def _kernel_stride(self) -> int:
        """The stride of the depthwise convolution that the kernels have for the module as it is."""
        return 1

    def _strided(self, x: Tensor) -> Tensor | None:
        """``_by_operator`` with a ``_kernel_stride()`` that is not 1."""
        raise NotImplementedError

    def _layers(self) -> list[nn.Module]:
        return [child_at(self, path) for path in self.parts.layers]

    def _tensors(self) -> tuple[list[Tensor], list[Tensor | None], list]:
        """Weights and biases of the layers, and what the norms compute with."""
        layers = self._layers()
        weights, biases = ([held(layer, name) for layer in layers] for name in ("weight", "bias"))
        norms = [path and of_module(child_at(self, path)) for path in self.parts.norms]
        return weights, biases, norms

    def _activations(self) -> tuple[str, str]:
        first, second = (path and activation_name(child_at(self, path)) for path in self.parts.activations)
        return first or "identity", second or "identity"

    def inference_parts(self) -> tuple[list[Tensor | None], tuple[float, ...], tuple[str, str]] | None:
        """What inference by the kernels takes: tensors in the operators' order, eps of the norms, activations.

        None where a norm takes batch statistics or the kernels do not serve the module.
        """
        if self.plain_reason() is not None:
            return None
        weights, biases, norms = self._tensors()
        if any(norm is not None and norm.training for norm in norms):
            return None
        return pack(weights, biases, norms), tuple([norm.eps if norm else 0.0 for norm in norms]), self._activations()

    def training_parts(self) -> tuple[list[Tensor], list[Tensor | None], list, tuple[str, str]] | None:
        """Weights and biases of the layers, the norms, and activations; None where the kernels do not serve it."""
        return None if self.plain_reason() is not None else (*self._tensors(), self._activations())


class FrozenBlock(Prepacked, attributes_of(BlockFusion)):
    """What is put before a fused class of the block: norms folded, and prepacked on the CPU."""

    @classmethod
    def freeze(cls, module: nn.Module) -> None:
        """Freeze a fused block whose tensors do not change any more, where that is faster."""
        if not (isinstance(module, BlockFusion) and is_made(type(module))):
            return
        parts = module.inference_parts()
        weight = None if parts is None or module._kernel_stride() != 1 else parts[0][0]
        if parts is None or weight is None or not is_freezable("leff", module, weight):
            return
        parameters, eps, activations = parts
        parameters = in_compute_dtype(parameters, weight.dtype)
        sizes = leff_sizes(parameters, activations, (1, 1))  # prepacking does not depend on the grid
        made = kernels._leff_prepack(weight, parameters, eps, [*sizes, 1]), eps, sizes[:-2]
        prepack_module(cast("Any", _frozen_class(type(module))), module, made)

    def _by_operator(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        residual: Tensor | None = None,
        layout: str = "tokens",
        num_prefix_tokens: int = 0,
    ) -> Tensor | None:
        weight = self._layers()[0]._buffers.get("weight")  # none in an adapter that was put in its place
        added = residual is None or (residual.dtype, residual.device) == (x.dtype, x.device)
        served = added and weight is not None and x.numel() and self._kernel_stride() == 1
        if weight is None or not served or not is_frozen_call("leff", self, x, weight):
            return super()._by_operator(x, grid_size, residual, layout, num_prefix_tokens)
        prepacked, eps, sizes = self._prepacked
        tokens, grid = to_tokens(x, sizes[0], layout, num_prefix_tokens, grid_size)
        planar = num_prefix_tokens == 0 and is_planar(tokens)
        if residual is not None:
            residual = in_memory_order(residual_to_tokens(residual, tokens, sizes[2], layout, grid), planar)
        out = empty_tokens_like(tokens, sizes[2], x.dtype, planar)
        kernels._leff_infer(in_memory_order(tokens, planar), [], prepacked, residual, eps, [*sizes, *grid, 1], out)
        return from_tokens(out, layout, grid, x)


def _frozen_class(fused_class: type[BlockFusion]) -> type[BlockFusion]:
    for found in fused_class.__subclasses__():
        if issubclass(found, FrozenBlock):
            return found
    name = f"Frozen{fused_class.__name__.removeprefix('Fused')}"
    return type(name, (FrozenBlock, fused_class), {"__module__": fused_class.__module__})
