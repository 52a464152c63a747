"""The module that a user drops in between a residual connection and the norm behind it."""

from __future__ import annotations

from torch import Tensor, nn

from ..common.module import adopt
from .op import add_layer_norm

__all__ = ["FusedAddNorm"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedAddNorm(nn.Module):
    """A residual connection and the norm behind it, fused. It has no state: the norm is an argument of the call.

    A norm that is no ``torch.nn.LayerNorm`` over the channels, or that someone watches with a hook, is called as it is.
    """

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedAddNorm:
        """A fused module in the place of a plain one, whose hooks it keeps."""
        return adopt(cls, plain, (), {})

    def forward(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module, num_prefix_tokens: int | None = None
    ) -> tuple[Tensor, ...]:
        """``x + branch`` and its norm.

        Args:
            x: (..., C).
            branch: of the shape of x, added to it; nothing if None.
            norm: over C channels.
            num_prefix_tokens: return the first tokens of the sum as well, for x of shape (B, N, C).

        Returns:
            As ``add_layer_norm``: the sum, to be used in the place of x, and its norm, (..., C); with
            ``num_prefix_tokens`` also the sum's first tokens (B, P, C).

        Raises:
            ValueError, TypeError, BackendError: as ``add_layer_norm``.
        """
        if is_plain_layer_norm(norm):
            weight, bias = norm.weight, norm.bias
            return add_layer_norm(x, branch, weight, bias, norm.eps, num_prefix_tokens=num_prefix_tokens)
        total = x if branch is None else x + branch
        out = norm(total)
        return (total, out) if num_prefix_tokens is None else (total, out, total[:, :num_prefix_tokens])


def is_plain_layer_norm(norm: nn.Module) -> bool:
    """Whether calling the norm is LayerNorm over the last dimension and nothing else."""
    return (
        type(norm) is nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and not nn.utils.parametrize.is_parametrized(norm)
        and not any(getattr(norm, kind) for kind in _HOOKS)
    )
