import pytest
import torch

from ceit.benchmarking import command
from ceit.benchmarking.bars import Bar, bar_rows, bars, judge
from ceit.benchmarking.command import BenchFailed, BenchOptions, bench
from ceit.benchmarking.groups import Group, plan
from ceit.benchmarking.measure import Entry, GroupResult
from ceit.runtime.options import UsageError

CPU = torch.device("cpu")
GROUP = Group("leff", "tiny", "training", "float32", 16)


def timed(contender, seconds, peak=1000):
    # No two rounds are alike.
    ratio = {"value": 1.0, "low": 1.0, "high": 1.0}
    times = [seconds * (1 + 0.001 * i) for i in range(9)]
    return Entry(contender, "timed", seconds=times, ratio=ratio, peak_bytes=peak)


def result(*entries):
    return GroupResult({}, GROUP.name, list(entries), 0, 0, 1)


def bar(speedup, memory=None, rivals=("plain", "compile"), ours="fused"):
    return Bar(GROUP, ours, rivals, speedup, memory)


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


def test_who_prepares_a_model_is_held_against_a_frozen_one_and_all_others_against_a_live_one(monkeypatch):
    monkeypatch.setattr("ceit.benchmarking.bars.has_bfloat16", lambda device: True)
    found, prepared = bars(CPU), {"compile-freezing", "openvino", "onnxruntime"}
    for b in found:
        assert b.ours == ("frozen" if prepared & set(b.rivals) else "fused"), b
        assert b.ours == "fused" or not {"plain", "compile"} & set(b.rivals), b
        assert b.contenders == ("plain", *(r for r in b.rivals if r != "plain"), b.ours)
    models = {b.group for b in found if (b.group.operator, b.group.phase) == ("model", "inference")}
    for group in (g for g in models if g.dtype == "float32"):
        assert {b.ours for b in found if b.group == group} == {"fused", "frozen"}


def test_a_frozen_model_is_judged_by_its_own_time():
    times = result(timed("plain", 9.0), timed("openvino", 2.0), timed("fused", 3.0), timed("frozen", 1.0))
    found = judge(bar(1.5, rivals=("openvino",), ours="frozen"), times)
    assert (found.verdict, found.ratio.value) == ("reached", pytest.approx(2.0))
    assert bar_rows([found])[1][:3] == [GROUP.name, "frozen", "openvino"]
    assert judge(bar(1.0, rivals=("openvino",), ours="fused"), times).verdict == "missed"


def test_bars_of_one_group_are_judged_of_one_measurement(monkeypatch):
    live, frozen = bar(1.0, rivals=("compile",)), bar(1.0, rivals=("openvino",), ours="frozen")
    monkeypatch.setattr(command, "bars", lambda device: [live, frozen])
    asked = []

    def measure(group, device, *, seconds, contenders):
        asked.append((group, sorted(contenders)))
        return result(*(timed(name, 1.0 if name in ("fused", "frozen") else 2.0) for name in contenders))

    monkeypatch.setattr(command, "measure_group", measure)
    bench(BenchOptions(bars=True, device="cpu"))
    assert asked == [(GROUP, ["compile", "frozen", "fused", "openvino", "plain"])]


def test_missed_bar_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(command, "bars", lambda device: [bar(1000.0, rivals=("plain",))])
    times = result(timed("plain", 1.0), timed("fused", 1.0))
    monkeypatch.setattr(command, "measure_group", lambda *args, **kwargs: times)
    with pytest.raises(BenchFailed, match=r"missed: leff-tiny-training-float32-b16 \(fused\)"):
        bench(BenchOptions(bars=True, device="cpu"))
    assert "1000.00" in capsys.readouterr().out


def test_bars_go_with_no_other_choice_of_groups():
    with pytest.raises(UsageError, match="--bars: expected without"):
        bench(BenchOptions(bars=True, quick=True, device="cpu"))
