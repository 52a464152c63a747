"""A residual connection and the norm behind it as a module without state: the plain one, and the fused one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..common.calls import unsupported_reason
from ..common.children import child_reason, children_reason, held
from ..common.module import Fusion, attributes_of
from .functional import add_norm_of_tensors
from .reference import prefix_of

__all__ = ["AddNorm", "FusedAddNorm", "is_plain_layer_norm"]

_NORM = (nn.LayerNorm,)


class AddNorm(nn.Module):
    """A residual connection and the norm behind it. It has no state: the norm is an argument of the call.

    TorchScript takes no modules as arguments: compiled there, a model has to add and call the norm itself.

    Shapes:
        (..., dim), (..., dim) -> (..., dim), (..., dim).
    """

    @torch.jit.unused
    def forward(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module, num_prefix_tokens: int | None = None
    ) -> tuple[Tensor, ...]:
        """Add a branch to the residual stream and normalise the sum.

        Args:
            x: the residual stream.
            branch: what is added to it; None for nothing.
            norm: the norm over ``dim`` channels.
            num_prefix_tokens: how many of the first tokens of the sum to return as well, of the last if negative.

        Returns:
            The sum, which takes the place of ``x``, and its norm; with ``num_prefix_tokens`` also these tokens.
        """
        x = x if branch is None else x + branch
        return (x, norm(x)) if num_prefix_tokens is None else (x, norm(x), prefix_of(x, num_prefix_tokens))


class AddNormFusion(Fusion, attributes_of(AddNorm)):
    """``forward`` of a residual connection with a ``torch.nn.LayerNorm`` over the channels behind it.

    Another norm, or one with a hook, is called as it is.
    """

    @torch.jit.unused
    def forward(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module, num_prefix_tokens: int | None = None
    ) -> tuple[Tensor, ...]:
        """``x + branch`` and its norm.

        Args:
            x: (..., C).
            branch: of the shape of x, added to it; nothing if None.
            norm: over C channels.
            num_prefix_tokens: the first tokens of the sum to return too, for x (B, N, C); the last if negative.

        Returns:
            As ``add_norm``: the sum, to be used in the place of x, and its norm, (..., C); with
            ``num_prefix_tokens`` also these tokens of the sum (B, P, C).

        Raises:
            ValueError, TypeError, BackendError: as ``add_norm``.
        """
        reason = self.plain_reason() or _norm_reason(norm)
        if reason is None:
            weight, bias = held(norm, "weight"), held(norm, "bias")
            reason = unsupported_reason(x, branch, weight, bias)
        if reason is not None:
            backends.leave_to_reference("add_norm", reason)
            return super().forward(x, branch, norm, num_prefix_tokens)
        return add_norm_of_tensors(x, branch, weight, bias, cast("nn.LayerNorm", norm).eps, num_prefix_tokens)

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        return children_reason(self, {})


class FusedAddNorm(AddNormFusion, AddNorm):
    """A residual connection and the norm behind it, fused. It has no state: the norm is an argument of the call."""


def _norm_reason(norm: nn.Module) -> str | None:
    """Why a norm has to be called, None if reading its tensors is as good; no global hook is set."""
    reason = child_reason("norm", norm, _NORM)
    if reason is None and len(shape := cast("nn.LayerNorm", norm).normalized_shape) != 1:
        reason = f"the kernels take norms over the channels alone, not over {tuple(shape)}"
    return reason


def is_plain_layer_norm(norm: nn.Module) -> bool:
    """Whether calling the norm is LayerNorm over the last dimension and nothing else."""
    return not _has_any_global_hook() and _norm_reason(norm) is None
