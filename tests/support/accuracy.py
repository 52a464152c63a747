"""The error rule: against float64, a kernel may be at most twice as wrong as plain PyTorch in the same dtype."""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

import torch
from torch import Tensor

# In units of eps times the largest value. The last rounding alone is half of that, also in a result that is as good as
# the type allows, while plain PyTorch's may be less by luck, down to none.
_ROUNDINGS = 1
# The ratio to what is allowed at which no more draws are needed.
_CLEAR = 0.5
# How many times the error allowed says that a draw lies at a jump, which only one of two ways to compute it has taken.
_JUMP = 100


def assert_as_accurate(names: Sequence[str], fused: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]):
    """The error rule for named results of one call, where they are so many numbers that luck has no part in it."""
    assert_as_accurate_over_draws(names, [(fused, plain, exact)])


def assert_as_accurate_over_draws(
    names: Sequence[str],
    draws: Iterable[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]],
    fewest: int = 2,
    with_jumps: bool = False,
):
    """The error rule for the typical ratio of the two errors over several draws of a call's inputs.

    Where batch statistics or long sums magnify roundings, the largest errors of two equally good ways to compute the
    same differ by more than a factor of two in one draw of ten. Their ratio is as often too small as too large, so its
    geometric mean is judged. A generator of draws is asked for more than ``fewest`` only until each mean is at most
    half of what is allowed.

    At a jump, as where a pool finds two values that differ by a rounding, one of the two goes to the wrong side and its
    error has no size. Where draws may have such (``with_jumps``) they are counted: the kernel may go wrong alone at
    most twice as often as plain PyTorch does.
    """
    ratios: dict[str, list[float]] = {name: [] for name in names}
    reversed_ratios: dict[str, list[float]] = {name: [] for name in names}
    for count, (fused, plain, exact) in enumerate(draws, start=1):
        for name, ours, theirs, truth in zip(names, fused, plain, exact, strict=True):
            assert ours.dtype == theirs.dtype, name
            assert ours.shape == truth.shape, name
            assert torch.isfinite(ours).all(), name
            if truth.numel():
                ratios[name].append(_ratio(ours, theirs, truth))
                reversed_ratios[name].append(_ratio(theirs, ours, truth))
        if count >= fewest and all(geometric_mean(found) <= _CLEAR for found in ratios.values() if found):
            return
    for name, found in ratios.items():
        jumps, plain_jumps = (sum(r > _JUMP for r in rs) for rs in (found, reversed_ratios[name]))
        if with_jumps and jumps <= 2 * plain_jumps:
            found = [r for r, reverse in zip(found, reversed_ratios[name], strict=True) if max(r, reverse) <= _JUMP]
        if found:
            assert geometric_mean(found) <= 1, f"{name}: errors are {found} times what is allowed"


def _ratio(ours: Tensor, theirs: Tensor, truth: Tensor) -> float:
    """The error in units of what is allowed, and at least a quarter: luck in one draw excuses little in another."""
    error, plain_error = ((result.double() - truth).abs().max().item() for result in (ours, theirs))
    allowed = 2 * plain_error + _ROUNDINGS * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    if error <= allowed / 4:
        return 0.25
    return error / allowed if allowed else float("inf")
