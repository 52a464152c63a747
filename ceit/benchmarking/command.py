"""`python -m ceit bench`: the contenders of some groups in a table, or this commit against another."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import torch

from ceit.running.options import UsageError, check, option
from ceit.running.training_state import write_atomically
from ceit_kernels.traffic import format_table

from .compare import Comparison, compare_commits
from .contenders import CONTENDERS, COSTLY
from .groups import Group, plan
from .machine import environment
from .measure import Entry, GroupResult, measure_group

__all__ = ["BenchFailed", "BenchOptions", "bench", "entry_row", "select_device", "select_groups"]

_bench = partial(option, group="benchmark")


class BenchFailed(Exception):
    """A contender computed something wrong, or the commit is slower than the one it is compared with."""


@dataclasses.dataclass(kw_only=True)
class BenchOptions:
    """Options of `bench`."""

    compare: str | None = _bench(
        None,
        "time the fused operators of this checkout against those of another commit, branch or tag, in turns; the exit "
        "status is 1 if one is slower beyond the noise",
        metavar="BASE",
    )
    only: str = _bench(
        "", "groups with this in their name, e.g. leff-tiny or training; all unless given", metavar="NAME"
    )
    quick: bool = _bench(False, "a few groups, without the contenders that take long to compile")
    seconds: float = _bench(4.0, "seconds to time each group", above=0)
    device: str = _bench("auto", "cpu or cuda; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    output: str | None = _bench(None, "file for the results, JSON", metavar="PATH")


def bench(options: BenchOptions) -> None:
    """Time the chosen groups and print a table of each, or of the comparison.

    Raises:
        UsageError: an option cannot be used.
        BenchFailed: a contender was refused, or this checkout is slower than `compare`.
    """
    check(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = select_device(options.device)
    groups = select_groups(device, options.only, quick=options.quick)
    if options.compare is not None:
        groups = [group for group in groups if group.operator != "norm"]
        results = compare_commits(options.compare, groups, seconds=options.seconds, say=partial(print, flush=True))
    else:
        names = [name for name in CONTENDERS if not (options.quick and name in COSTLY)]
        results = []
        for group in groups:
            results.append(measure_group(group, device, seconds=options.seconds, contenders=names))
            print(f"\n{group.name}\n\n{format_table(_rows(results[-1]))}", flush=True)
    if options.output is not None:
        kept = {"environment": environment(device), "results": [dataclasses.asdict(result) for result in results]}
        write_atomically(Path(options.output), lambda file: file.write(json.dumps(kept, indent=1).encode()))
    _judge(results)


def select_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        UsageError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda was asked for, but no CUDA GPU is available to PyTorch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def select_groups(device: torch.device, only: str, *, quick: bool) -> list[Group]:
    """The groups of a device's plan that have `only` in their name.

    Raises:
        UsageError: there is none.
    """
    groups = plan(device, quick=quick)
    chosen = [group for group in groups if only in group.name]
    if not chosen:
        raise UsageError(f"--only: no group has {only!r} in its name; there are {', '.join(g.name for g in groups)}")
    return chosen


def _rows(result: GroupResult) -> list[list[str]]:
    head = ["contender", "ms", "plain / this", "99% interval", "GB/s", "TFLOP/s", "peak MB", "saved MB", "note"]
    return [head, *(entry_row(entry, result) for entry in result.entries)]


def entry_row(entry: Entry, result: GroupResult) -> list[str]:
    """A contender's cells: time, ratio with its interval, rates, memory, and the backends or the reason."""
    if entry.median is None:
        return [entry.contender, *["-"] * 7, f"{entry.status}: {entry.reason}"]
    ratio = entry.ratio
    return [
        entry.contender,
        f"{1e3 * entry.median:,.2f}",
        f"{ratio['value']:.2f}",
        f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        f"{result.compulsory_bytes / entry.median / 1e9:,.1f}",
        f"{result.flops / entry.median / 1e12:,.3f}",
        "-" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:,.1f}",
        "-" if entry.saved_bytes is None else f"{entry.saved_bytes / 1e6:,.1f}",
        ", ".join(f"{operator} by {by['backend']}" for operator, by in entry.backends.items()),
    ]


def _judge(results: list[GroupResult] | list[Comparison]) -> None:
    wrong = [
        f"{result.name}: {entry.contender}: {entry.reason}"
        for result in results
        if isinstance(result, GroupResult)
        for entry in result.entries
        if entry.status == "refused"
    ]
    slower = [result.name for result in results if isinstance(result, Comparison) and result.verdict == "slower"]
    if wrong:
        raise BenchFailed(f"refused, for the result is wrong: {'; '.join(wrong)}")
    if slower:
        raise BenchFailed(f"slower beyond the noise: {', '.join(slower)}")
