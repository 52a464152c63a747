"""`python -m ceit bench`: implementations of workloads in a table, the targets, or this commit against another."""

import argparse
import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ceit.runtime.checkpoints import write_atomically
from ceit.runtime.options import UsageError, add_options, check, option

from ..traffic import format_table
from .compare import Comparison, compare_commits
from .implementations import COSTLY, IMPLEMENTATIONS
from .machine import environment
from .measure import Entry, Result, measure_workload
from .targets import TargetResult, judge, target_rows, targets
from .workloads import Workload, plan

__all__ = ["BenchFailed", "BenchOptions", "bench", "entry_row", "main", "select_device", "select_workloads"]

_bench = partial(option, group="benchmark")


class BenchFailed(Exception):
    """An implementation computed something wrong, a target is missed, or the commit is slower than its base."""


@dataclasses.dataclass(kw_only=True)
class BenchOptions:
    """Options of `bench`."""

    compare: str | None = _bench(
        None,
        "time the fused operators of this checkout against those of another commit, branch or tag, in turns, live and, "
        "where both have it, frozen; the exit status is 1 if one is slower beyond the noise",
        metavar="BASE",
    )
    targets: bool = _bench(
        False,
        "on the CPU, hold LeFF and both models to the best that is free, inference and training, with a verdict for "
        "each; takes a quarter of an hour; the exit status is 1 if a target is missed",
    )
    only: str = _bench(
        "",
        "the workload of this name, or all with this in their names, e.g. leff-tiny or training; all unless given",
        metavar="NAME",
    )
    quick: bool = _bench(False, "a few workloads, without the implementations that take long to compile")
    seconds: float = _bench(4.0, "seconds to time each workload", above=0)
    device: str = _bench("auto", "cpu or cuda; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    output: str | None = _bench(None, "file for the results, JSON", metavar="PATH")


def main(arguments: Sequence[str]) -> int:
    """Run `bench` and return its exit status: 0, 1 if it failed, 2 if it was used wrongly, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m ceit bench", description="Time operators and models.")
    add_options(parser, BenchOptions)
    try:
        bench(BenchOptions(**vars(parser.parse_args(arguments))))
    except (UsageError, BenchFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def bench(options: BenchOptions) -> None:
    """Time the chosen workloads and print a table of each, of the targets or of the comparison.

    Raises:
        UsageError: an option cannot be used.
        BenchFailed: an implementation was refused, a target is missed, or this checkout is slower than `compare`.
    """
    check(options)
    if options.targets and (options.compare is not None or options.quick):
        raise UsageError("--targets: expected without --compare and --quick")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = select_device(options.device)
    results = _check_targets(options, device) if options.targets else _time(options, device)
    if options.output is not None:
        kept = {"environment": environment(device), "results": [dataclasses.asdict(result) for result in results]}
        write_atomically(Path(options.output), lambda file: file.write(json.dumps(kept, indent=1).encode()))
    _judge(results)


def _time(options: BenchOptions, device: torch.device) -> list[Result] | list[Comparison]:
    workloads = select_workloads(plan(device, quick=options.quick), options.only)
    if options.compare is not None:
        return compare_commits(options.compare, workloads, seconds=options.seconds, say=partial(print, flush=True))
    names = [name for name in IMPLEMENTATIONS if not (options.quick and name in COSTLY)]
    return [_measure(workload, device, options.seconds, names) for workload in workloads]


def _check_targets(options: BenchOptions, device: torch.device) -> list[Result | TargetResult]:
    by_workload = defaultdict(list)
    for target in targets(device):
        by_workload[target.workload].append(target)
    if not by_workload:
        raise UsageError(f"--targets: none are set for {device.type}, only for the CPU (--device cpu)")
    measured, judged = [], []
    for workload in select_workloads(list(by_workload), options.only):
        implementations = dict.fromkeys(name for target in by_workload[workload] for name in target.implementations)
        measured.append(_measure(workload, device, options.seconds, list(implementations)))
        judged += [judge(target, measured[-1]) for target in by_workload[workload]]
    print(f"\n{format_table(target_rows(judged))}", flush=True)
    return measured + judged


def _measure(workload: Workload, device: torch.device, seconds: float, implementations: Sequence[str]) -> Result:
    result = measure_workload(workload, device, seconds=seconds, implementations=implementations)
    print(f"\n{workload.name}\n\n{format_table(_rows(result))}", flush=True)
    return result


def select_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        UsageError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda was asked for, but no CUDA GPU is available to PyTorch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def select_workloads(workloads: Sequence[Workload], only: str) -> list[Workload]:
    """The one of these workloads with the name `only`, or those that have it in their name.

    Raises:
        UsageError: there is none.
    """
    chosen = [workload for workload in workloads if only == workload.name] or [
        workload for workload in workloads if only in workload.name
    ]
    if not chosen:
        raise UsageError(
            f"--only: no workload has {only!r} in its name; there are {', '.join(g.name for g in workloads)}"
        )
    return chosen


def _rows(result: Result) -> list[list[str]]:
    head = ["implementation", "ms", "plain / this", "99% interval", "GB/s", "TFLOP/s", "peak MB", "saved MB", "note"]
    return [head, *(entry_row(entry, result) for entry in result.entries)]


def entry_row(entry: Entry, result: Result) -> list[str]:
    """An implementation's cells: time, ratio with its interval, rates, memory, and the backends or the reason."""
    if entry.median is None:
        return [entry.implementation, *["-"] * 7, f"{entry.status}: {entry.reason}"]
    ratio = entry.ratio
    return [
        entry.implementation,
        f"{1e3 * entry.median:,.2f}",
        f"{ratio['value']:.2f}",
        f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        f"{result.compulsory_bytes / entry.median / 1e9:,.1f}",
        f"{result.flops / entry.median / 1e12:,.3f}",
        "-" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:,.1f}",
        "-" if entry.saved_bytes is None else f"{entry.saved_bytes / 1e6:,.1f}",
        ", ".join(f"{operator} by {by['backend']}" for operator, by in entry.backends.items()),
    ]


def _judge(results: Sequence[Result | TargetResult | Comparison]) -> None:
    wrong = [
        f"{result.name}: {entry.implementation}: {entry.reason}"
        for result in results
        if isinstance(result, Result)
        for entry in result.entries
        if entry.status == "refused"
    ]
    slower = [result.name for result in results if isinstance(result, Comparison) and result.verdict == "slower"]
    missed_targets = [r.target for r in results if isinstance(r, TargetResult) and r.verdict == "missed"]
    missed = [f"{target.workload.name} ({target.ours})" for target in missed_targets]
    if wrong:
        raise BenchFailed(f"refused, for the result is wrong: {'; '.join(wrong)}")
    if slower:
        raise BenchFailed(f"slower beyond the noise: {', '.join(slower)}")
    if missed:
        raise BenchFailed(f"missed: {', '.join(missed)}")
