"""A test for each time and, with --targets or --compare, for each verdict."""

import dataclasses

import pytest


def test_time(session, report_times, workload, implementation):
    result = session.measure(workload)
    if result is None:
        pytest.skip("the run's time is used up")
    entry = result[implementation]
    if entry.status == "absent":
        pytest.skip(entry.reason)
    if entry.status != "timed":
        pytest.fail(f"{implementation} {entry.status}: {entry.reason}", pytrace=False)
    rates = {"GB/s": result.compulsory_bytes / 1e9, "TFLOP/s": result.flops / 1e12}
    facts = {key: value for key, value in dataclasses.asdict(entry).items() if key != "seconds"}
    report_times(workload, entry.seconds, facts | {unit: amount / entry.median for unit, amount in rates.items()})


def test_target(session, report_times, target):
    found = session.judge(target)
    if found.verdict == "missed":
        pytest.fail(str(found), pytrace=False)
    report_times(target.workload, session.results[target.workload][target.ours].seconds, dataclasses.asdict(found))


def test_commit(session, report_times, workers, workload, implementation):
    found = session.compare(*workers, workload, implementation)
    if found.verdict == "slower":
        pytest.fail("slower beyond the noise", pytrace=False)
    if found.ratio is None:
        pytest.skip(found.verdict)
    report_times(workload, found.head_seconds, dataclasses.asdict(found))
