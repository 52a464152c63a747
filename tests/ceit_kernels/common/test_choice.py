"""Which implementation serves a kind of call: what is measured, when, and what is kept. Time is a number here."""

import json

import pytest
import torch

from ceit_kernels.common import choice, kept
from ceit_kernels.common.choice import describe_findings, fastest
from ceit_kernels.common.launch import record_launches

RIGHT = torch.tensor([3.0, 4.0])


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """The implementations that were timed. Each is a function with its time as an attribute."""
    timed = []

    def seconds(run):
        run()
        timed.append(run.seconds)
        return run.seconds

    monkeypatch.delenv("CEIT_KERNELS_MEASURE", raising=False)
    monkeypatch.setenv("CEIT_KERNELS_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(choice, "gpu_seconds", seconds)
    monkeypatch.setattr(choice, "has_clock", lambda x: True)
    monkeypatch.setattr(kept, "chip_name", lambda device: "a chip")
    choice._kept.forget()
    yield timed
    choice._kept.forget()


def implementation(seconds, result=RIGHT):
    def run():
        if isinstance(result, Exception):
            raise result
        return [result]

    run.seconds = seconds
    return run


def choose(call="call", dtype=torch.float32, rule="fused", **runs):
    runs = {"fused": implementation(3e-3), "library": implementation(1e-3), "plain": implementation(2e-3), **runs}
    return fastest(call, torch.empty(1), dtype, "plain", lambda: runs, rule)


def test_the_fastest_is_taken_and_a_kind_of_call_measured_once(clock):
    assert choose() == choose() == "library"
    assert sorted(clock) == [1e-3, 2e-3, 3e-3]
    assert choose("another", plain=implementation(1e-4)) == "plain"
    assert choose(dtype=torch.float64, fused=implementation(1e-4)) == "fused"


def test_autocast_remembers_nothing_of_what_is_measured(clock):
    seen = []

    def run():
        seen.append(torch.is_autocast_cache_enabled())
        return [RIGHT]

    run.seconds = 1e-4
    assert choose(library=run) == "library"
    assert set(seen) == {False}
    assert torch.is_autocast_cache_enabled()


def test_deterministic_runs_go_by_the_rule(clock):
    choose()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(rule="fused") == "fused"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT + 0.1,
        RIGHT * torch.nan,
        RIGHT[:1],
        RIGHT.double(),
        RuntimeError("an illegal memory access"),
        torch.OutOfMemoryError(),
    ],
    ids=str,
)
def test_one_that_fails_or_gives_wrong_results_never_wins(clock, wrong):
    assert choose(library=implementation(1e-9, wrong)) == "plain"
    assert choice._kept.find(next(iter(choice._kept.everything()))).seconds["library"] is None


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.05), (torch.float32, 5e-3), (torch.float64, 1e-6)])
def test_results_may_differ_by_rounding(clock, dtype, most):
    right = RIGHT.double()
    for error, winner in ((0.9 * most, "library"), (1.1 * most, "plain")):
        plain, library = implementation(2e-3, right), implementation(1e-3, right * (1 + error))
        assert choose(str(error), dtype, plain=plain, library=library) == winner


def test_where_not_even_plain_pytorch_can_be_timed_a_later_call_is_measured(clock):
    assert choose(plain=implementation(1e-3, torch.OutOfMemoryError())) == "fused"
    assert not clock
    assert choose() == "library"


def test_a_later_process_reads_the_finding(clock):
    choose()
    choice._kept.forget()
    clock.clear()
    assert choose() == "library"
    assert not clock
    (entry,) = json.loads(choice._kept.path().read_text()).values()
    assert entry == {"winner": "library", "seconds": {"fused": 3e-3, "library": 1e-3, "plain": 2e-3}}


@pytest.mark.parametrize("entry", [{"winner": "library"}, {"winner": "library", "seconds": {"plain": 1.0}}, 1])
def test_a_file_that_cannot_be_read_is_named_and_replaced(clock, entry):
    choice._kept.path().write_text(json.dumps({"a": entry}))
    with pytest.warns(UserWarning, match="expected measured times, which are found again"):
        assert choose() == "library"
    assert len(json.loads(choice._kept.path().read_text())) == 1


def test_nothing_is_measured_during_capture_recording_or_compilation_nor_where_that_is_turned_off(clock, monkeypatch):
    with record_launches():
        assert choose() == "fused"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_capturing", lambda: True)
        assert choose() == "fused"
    with monkeypatch.context() as patch:
        patch.setenv("CEIT_KERNELS_MEASURE", "0")
        assert choose(rule="plain") == "plain"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_eager", lambda x: False)
        assert choose() == "fused"
    assert not clock
    assert choose() == "library"
    monkeypatch.setattr(choice, "is_capturing", lambda: True)
    assert choose() == "library"  # what is known holds in a graph too


def test_findings_read_as_lines(clock):
    choose("leff inference|tokens=64", library=implementation(1e-4, RuntimeError()))
    (line,) = describe_findings()
    assert (
        line == "leff inference|tokens=64 in float32 on a chip: plain (fused 3,000 us, library failed, plain 2,000 us)"
    )
