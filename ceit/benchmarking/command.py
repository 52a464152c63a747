"""`python -m ceit bench`: the contenders of some groups in a table, the bars, or this commit against another."""

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ceit.runtime.checkpoints import write_atomically
from ceit.runtime.options import UsageError, check, option
from ceit_kernels.traffic import format_table

from .bars import BarResult, bar_rows, bars, judge
from .compare import Comparison, compare_commits
from .contenders import CONTENDERS, COSTLY
from .groups import Group, plan
from .machine import environment
from .measure import Entry, GroupResult, measure_group

__all__ = ["BenchFailed", "BenchOptions", "bench", "entry_row", "select_device", "select_groups"]

_bench = partial(option, group="benchmark")


class BenchFailed(Exception):
    """A contender computed something wrong, a bar is missed, or the commit is slower than the one compared with."""


@dataclasses.dataclass(kw_only=True)
class BenchOptions:
    """Options of `bench`."""

    compare: str | None = _bench(
        None,
        "time the fused operators of this checkout against those of another commit, branch or tag, in turns, live and, "
        "where both have it, frozen; the exit status is 1 if one is slower beyond the noise",
        metavar="BASE",
    )
    bars: bool = _bench(
        False,
        "on the CPU, hold LeFF and both models to the best that is free, inference and training, with a verdict for "
        "each; takes a quarter of an hour; the exit status is 1 if a bar is missed",
    )
    only: str = _bench(
        "",
        "the group of this name, or all with this in their names, e.g. leff-tiny or training; all unless given",
        metavar="NAME",
    )
    quick: bool = _bench(False, "a few groups, without the contenders that take long to compile")
    seconds: float = _bench(4.0, "seconds to time each group", above=0)
    device: str = _bench("auto", "cpu or cuda; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    output: str | None = _bench(None, "file for the results, JSON", metavar="PATH")


def bench(options: BenchOptions) -> None:
    """Time the chosen groups and print a table of each, of the bars or of the comparison.

    Raises:
        UsageError: an option cannot be used.
        BenchFailed: a contender was refused, a bar is missed, or this checkout is slower than `compare`.
    """
    check(options)
    if options.bars and (options.compare is not None or options.quick):
        raise UsageError("--bars: expected without --compare and --quick")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = select_device(options.device)
    results = _hold_to_bars(options, device) if options.bars else _time(options, device)
    if options.output is not None:
        kept = {"environment": environment(device), "results": [dataclasses.asdict(result) for result in results]}
        write_atomically(Path(options.output), lambda file: file.write(json.dumps(kept, indent=1).encode()))
    _judge(results)


def _time(options: BenchOptions, device: torch.device) -> list[GroupResult] | list[Comparison]:
    groups = select_groups(plan(device, quick=options.quick), options.only)
    if options.compare is not None:
        return compare_commits(options.compare, groups, seconds=options.seconds, say=partial(print, flush=True))
    names = [name for name in CONTENDERS if not (options.quick and name in COSTLY)]
    return [_measure(group, device, options.seconds, names) for group in groups]


def _hold_to_bars(options: BenchOptions, device: torch.device) -> list[GroupResult | BarResult]:
    by_group = defaultdict(list)
    for bar in bars(device):
        by_group[bar.group].append(bar)
    if not by_group:
        raise UsageError(f"--bars: none are set for {device.type}, only for the CPU (--device cpu)")
    measured, judged = [], []
    for group in select_groups(list(by_group), options.only):
        contenders = dict.fromkeys(name for bar in by_group[group] for name in bar.contenders)
        measured.append(_measure(group, device, options.seconds, list(contenders)))
        judged += [judge(bar, measured[-1]) for bar in by_group[group]]
    print(f"\n{format_table(bar_rows(judged))}", flush=True)
    return measured + judged


def _measure(group: Group, device: torch.device, seconds: float, contenders: Sequence[str]) -> GroupResult:
    result = measure_group(group, device, seconds=seconds, contenders=contenders)
    print(f"\n{group.name}\n\n{format_table(_rows(result))}", flush=True)
    return result


def select_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        UsageError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda was asked for, but no CUDA GPU is available to PyTorch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def select_groups(groups: Sequence[Group], only: str) -> list[Group]:
    """The one of these groups with the name `only`, or those that have it in their name.

    Raises:
        UsageError: there is none.
    """
    chosen = [group for group in groups if only == group.name] or [group for group in groups if only in group.name]
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


def _judge(results: Sequence[GroupResult | BarResult | Comparison]) -> None:
    wrong = [
        f"{result.name}: {entry.contender}: {entry.reason}"
        for result in results
        if isinstance(result, GroupResult)
        for entry in result.entries
        if entry.status == "refused"
    ]
    slower = [result.name for result in results if isinstance(result, Comparison) and result.verdict == "slower"]
    bars_missed = [r.bar for r in results if isinstance(r, BarResult) and r.verdict == "missed"]
    missed = [f"{bar.group.name} ({bar.ours})" for bar in bars_missed]
    if wrong:
        raise BenchFailed(f"refused, for the result is wrong: {'; '.join(wrong)}")
    if slower:
        raise BenchFailed(f"slower beyond the noise: {', '.join(slower)}")
    if missed:
        raise BenchFailed(f"missed: {', '.join(missed)}")
