import pytest
import torch

from ceit.benchmarking import command
from ceit.benchmarking.bars import Bar, bar_rows, bars, judge
from ceit.benchmarking.command import BenchFailed, BenchOptions, bench
from ceit.benchmarking.groups import Group, plan
from ceit.benchmarking.measure import Entry, GroupResult
from ceit.running.options import UsageError

CPU = torch.device("cpu")
GROUP = Group("leff", "tiny", "training", "float32", 16)


def timed(contender, seconds, peak=1000):
    # No two rounds are alike.
    ratio = {"value": 1.0, "low": 1.0, "high": 1.0}
    times = [seconds * (1 + 0.001 * i) for i in range(9)]
    return Entry(contender, "timed", seconds=times, ratio=ratio, peak_bytes=peak)


def result(*entries):
    return GroupResult({}, GROUP.name, list(entries), 0, 0, 1)


def bar(speedup, memory=None, rivals=("plain", "compile")):
    return Bar(GROUP, rivals, speedup, memory)


def test_fastest_rival_counts():
    found = judge(bar(1.5), result(timed("plain", 4.0), timed("compile", 2.0), timed("fused", 1.0)))
    assert (found.rival, found.verdict) == ("compile", "reached")
    assert found.ratio.value == pytest.approx(2.0)
    assert judge(bar(2.5), result(timed("plain", 4.0), timed("compile", 2.0), timed("fused", 1.0))).verdict == "missed"


def test_interval_that_holds_the_bar_leaves_it_open():
    noisy = Entry("fused", "timed", seconds=[0.5, 1.5, 0.5, 1.5, 1.0], peak_bytes=1)
    steady = Entry("plain", "timed", seconds=[1.0] * 5, peak_bytes=1)
    found = judge(bar(1.0, rivals=("plain",)), result(steady, noisy))
    assert (found.verdict, found.reason) == ("open", "the interval holds the bar")


def test_lacking_rival_leaves_a_reached_bar_open_and_a_missed_one_missed():
    lacking = Entry("compile", "failed", "no compiler")
    found = judge(bar(1.5), result(timed("plain", 2.0), lacking, timed("fused", 1.0)))
    assert (found.verdict, found.reason) == ("open", "compile failed: no compiler")
    assert judge(bar(2.5), result(timed("plain", 2.0), lacking, timed("fused", 1.0))).verdict == "missed"


def test_memory_is_held_to_plain_pytorch():
    faster = [timed("plain", 2.0, peak=1000), timed("compile", 3.0, peak=100)]
    assert judge(bar(1.5, memory=0.6), result(*faster, timed("fused", 1.0, peak=600))).verdict == "reached"
    found = judge(bar(1.5, memory=0.6), result(*faster, timed("fused", 1.0, peak=601)))
    assert found.verdict == "missed"
    assert "0.60 (at most 0.60)" in bar_rows([found])[1]


def test_refused_fused_operator_misses():
    refused = Entry("fused", "refused", "output: relative error 1e-01")
    found = judge(bar(1.0), result(timed("plain", 1.0), timed("compile", 1.0), refused))
    assert (found.verdict, found.ratio) == ("missed", None)
    assert "relative error" in bar_rows([found])[1][-1]


def test_bars_of_both_models_are_at_every_batch_that_the_plan_has_for_them():
    groups = {b.group for b in bars(CPU)}
    models = {(g.size, g.phase, g.batch) for g in groups if (g.operator, g.dtype) == ("model", "float32")}
    inference = {(size, "inference", batch) for size in ("tiny", "small") for batch in (1, 16)}
    assert models == inference | {(size, "training", 8) for size in ("tiny", "small")}
    assert groups <= set(plan(CPU))
    assert len(groups) == len(bars(CPU))


def test_missed_bar_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(command, "bars", lambda device: [bar(1000.0, rivals=("plain",))])
    times = result(timed("plain", 1.0), timed("fused", 1.0))
    monkeypatch.setattr(command, "measure_group", lambda *args, **kwargs: times)
    with pytest.raises(BenchFailed, match="missed: leff-tiny-training"):
        bench(BenchOptions(bars=True, device="cpu"))
    assert "1000.00" in capsys.readouterr().out


def test_bars_go_with_no_other_choice_of_groups():
    with pytest.raises(UsageError, match="--bars: expected without"):
        bench(BenchOptions(bars=True, quick=True, device="cpu"))
