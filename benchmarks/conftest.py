"""Parameters of the benchmarks, and how a workload that is measured in turns becomes times of single tests.

A workload is measured when its first test runs. pytest-benchmark then reads the times of each implementation from a
clock that replays them, so its tables and its JSON hold the interleaved measurement.
"""

from __future__ import annotations

import os

# The profiler that sums up memory otherwise speaks of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from .harness.implementations import COSTLY, IMPLEMENTATIONS
from .harness.measure import Clock, Result, measure_workload
from .harness.workloads import Workload, plan

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
    parser.addoption("--quick", action="store_true", help="a few workloads and implementations: 3 minutes on two cores")


def pytest_generate_tests(metafunc):
    operator = getattr(metafunc.module, "OPERATOR", None)
    if operator is not None:
        workloads = [g for g in plan(DEVICE, quick=metafunc.config.getoption("--quick")) if g.operator == operator]
        metafunc.parametrize("workload", workloads, ids=[workload.name for workload in workloads])
        metafunc.parametrize("implementation", IMPLEMENTATIONS)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, disable_gc=True))


@pytest.fixture(scope="session")
def measure(request) -> Callable[[Workload], Result]:
    """Measure a workload once, with the implementations whose tests were selected."""
    quick = request.config.getoption("--quick")
    clock, results = Clock(QUICK_SECONDS if quick else FULL_SECONDS), {}

    def measured(workload: Workload) -> Result:
        if workload.name not in results:
            chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = [p["implementation"] for p in chosen if p.get("workload") == workload]
            names = [name for name in names if not (quick and name in COSTLY)]
            seconds = 1.0 if quick else 4.0
            results[workload.name] = measure_workload(
                workload, DEVICE, seconds=seconds, implementations=names, clock=clock
            )
        return results[workload.name]

    return measured


@pytest.fixture
def report_time(benchmark, measure) -> Callable[[Workload, str], None]:
    """Give an implementation's times to pytest-benchmark, or say why there are none."""

    def report(workload: Workload, implementation: str) -> None:
        result = measure(workload)
        entry = next((e for e in result.entries if e.implementation == implementation), None)
        if entry is None:
            pytest.skip("left out by --quick")
        if entry.status == "absent":
            pytest.skip(entry.reason)
        if entry.status != "timed":
            pytest.fail(f"{implementation} {entry.status}: {entry.reason}", pytrace=False)
        benchmark.group = workload.name
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
