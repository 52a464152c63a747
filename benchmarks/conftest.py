"""Parameters of the benchmarks, and how a group that is measured in turns becomes times of single tests.

A group is measured when its first test runs. pytest-benchmark then reads the times of each contender from a clock that
replays them, so its tables and its JSON hold the interleaved measurement.
"""

from __future__ import annotations

import os

# The profiler that sums up memory otherwise speaks of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from ceit.benchmarking.contenders import CONTENDERS, COSTLY
from ceit.benchmarking.groups import Group, plan
from ceit.benchmarking.measure import Clock, GroupResult, measure_group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK_SECONDS, FULL_SECONDS = 150.0, 840.0


class ReplayClock:
    """A timer for pytest-benchmark that goes on only when `advance` is called, by the next measured time."""

    def __init__(self) -> None:
        self._now, self._times = 0.0, iter(())

    def load(self, seconds: list[float]) -> None:
        """Set the times that follow; the last one repeats."""
        self._times = _repeating_last(seconds)

    def advance(self) -> None:
        """Let one call pass."""
        self._now += next(self._times)

    def __call__(self) -> float:
        return self._now


def _repeating_last(seconds: list[float]) -> Iterator[float]:
    yield from seconds
    while True:
        yield seconds[-1]


REPLAY = ReplayClock()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a few groups and contenders: 3 minutes on two cores")


def pytest_generate_tests(metafunc):
    operator = getattr(metafunc.module, "OPERATOR", None)
    if operator is not None:
        groups = [g for g in plan(DEVICE, quick=metafunc.config.getoption("--quick")) if g.operator == operator]
        metafunc.parametrize("group", groups, ids=[group.name for group in groups])
        metafunc.parametrize("contender", CONTENDERS)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, disable_gc=True))


@pytest.fixture(scope="session")
def measure(request) -> Callable[[Group], GroupResult]:
    """Measure a group once, with the contenders whose tests were selected."""
    quick = request.config.getoption("--quick")
    clock, results = Clock(QUICK_SECONDS if quick else FULL_SECONDS), {}

    def measured(group: Group) -> GroupResult:
        if group.name not in results:
            chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = [p["contender"] for p in chosen if p.get("group") == group]
            names = [name for name in names if not (quick and name in COSTLY)]
            seconds = 1.0 if quick else 4.0
            results[group.name] = measure_group(group, DEVICE, seconds=seconds, contenders=names, clock=clock)
        return results[group.name]

    return measured


@pytest.fixture
def report_time(benchmark, measure) -> Callable[[Group, str], None]:
    """Give a contender's times to pytest-benchmark, or say why there are none."""

    def report(group: Group, contender: str) -> None:
        result = measure(group)
        entry = next((e for e in result.entries if e.contender == contender), None)
        if entry is None:
            pytest.skip("left out by --quick")
        if entry.status == "absent":
            pytest.skip(entry.reason)
        if entry.status != "timed":
            pytest.fail(f"{contender} {entry.status}: {entry.reason}", pytrace=False)
        benchmark.group = group.name
        kept = dataclasses.asdict(entry)
        del kept["seconds"]
        per_second = {"GB/s": result.compulsory_bytes / 1e9, "TFLOP/s": result.flops / 1e12}
        benchmark.extra_info |= kept | {unit: amount / entry.median for unit, amount in per_second.items()}
        REPLAY.load(entry.seconds)
        benchmark.pedantic(REPLAY.advance, rounds=len(entry.seconds))

    return report


def pytest_terminal_summary(terminalreporter):
    """List who was not timed and why, whatever the verbosity."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("not timed")
        for report in skipped:
            terminalreporter.line(f"{report.nodeid.split('::')[-1]}: {report.longrepr[2].removeprefix('Skipped: ')}")
