"""How workloads that are measured in turns become tests, and what the run says at its end.

A workload is measured when its first test runs. pytest-benchmark then reads the times of each implementation from a
clock that replays them, so its tables and its JSON hold the interleaved measurement.
"""

from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.harness.compare import Worker, checkout, comparison_rows
from benchmarks.harness.measure import result_rows
from benchmarks.harness.targets import target_rows
from benchmarks.session import OPTIONS, Session
from benchmarks.tables import format_table
from ceit.runtime.errors import UsageError

SESSION = pytest.StashKey[Session]()


class ReplayClock:
    """A timer for pytest-benchmark that goes on only when `advance` is called, by the next measured time."""

    def __init__(self):
        self.now, self.times = 0.0, []

    def advance(self):
        """Let one call pass; the last time repeats."""
        self.now += self.times.pop(0) if len(self.times) > 1 else self.times[0]

    def __call__(self):
        return self.now


REPLAY = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("ceit benchmarks")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)


def pytest_configure(config):
    options = {name.strip("-"): config.getoption(name) for name in OPTIONS if name != "--report"}
    try:
        config.stash[SESSION] = Session(**options)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc):
    session = metafunc.config.stash[SESSION]
    if "target" in metafunc.fixturenames:
        names = [f"{target.workload.name}-{target.ours}" for target in session.targets]
        metafunc.parametrize("target", session.targets, ids=names)
        return
    wanted = bool(session.base) == ("workers" in metafunc.fixturenames)
    cases = [(workload, name) for workload, names in session.cases.items() for name in names if wanted]
    metafunc.parametrize(("workload", "implementation"), cases, ids=[f"{w.name}-{name}" for w, name in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # Without parameters a test is there once, to be skipped.
    items[:] = [item for item in items if not item.get_closest_marker("skip")]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, disable_gc=True))


def pytest_collection_finish(session):
    """Measure what was selected, and of the workloads of targets all."""
    found = session.config.stash[SESSION]
    selected = defaultdict(list)
    for item in session.items:
        if item.originalname == "test_time":
            selected[item.callspec.params["workload"]].append(item.callspec.params["implementation"])
    if not found.targets:
        found.cases = dict(selected)


@pytest.fixture
def session(request):
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def workers(request):
    """Processes that time the other commit and this checkout."""
    try:
        base = request.config.stash[SESSION].base
        with checkout(base) as root, Worker(root) as base, Worker(Path(__file__).parents[1]) as head:
            yield base, head
    except UsageError as error:
        pytest.exit(str(error), returncode=4)


@pytest.fixture
def report_times(benchmark):
    """Give times, and what else is known of them, to pytest-benchmark."""

    def report(workload, seconds, facts):
        benchmark.group = workload.name
        benchmark.extra_info |= facts
        REPLAY.times = list(seconds)
        benchmark.pedantic(REPLAY.advance, rounds=len(seconds))

    return report


def pytest_terminal_summary(terminalreporter, config):
    session, folder = config.stash[SESSION], config.getoption("--report")
    tables = {result.workload.name: result_rows(result) for result in session.results.values()}
    if session.judged:
        tables["targets"] = target_rows(session.judged)
    if session.comparisons:
        tables[f"this checkout against {session.base}"] = comparison_rows(session.comparisons)
    for title, rows in tables.items():
        terminalreporter.section(title)
        terminalreporter.write_line(format_table(rows))
    if folder is not None and session.results:
        from benchmarks.report import make_report, write_report

        write_report(make_report(session, _command(config)), Path(folder))
        terminalreporter.write_line(f"\nthe report is {Path(folder, 'report.md')}")


def _command(config):
    """The options that decide over the numbers, as they were given."""
    words = ["python -m benchmarks"]
    for name, settings in OPTIONS.items():
        value = config.getoption(name)
        if name != "--report" and value not in (None, False, settings.get("default")):
            words += [name] if value is True else [name, f"{value:g}" if isinstance(value, float) else value]
    return " ".join(words)
