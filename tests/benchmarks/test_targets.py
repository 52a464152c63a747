import subprocess
import sys

import pytest
import torch

from benchmarks import session
from benchmarks import test_benchmarks as suite
from benchmarks.harness.instructions import _VARIABLES, limit_instructions
from benchmarks.harness.measure import Entry, Result
from benchmarks.harness.statistics import Ratio
from benchmarks.harness.targets import Target, judge, target_rows, targets_of, targets_of_others
from benchmarks.session import Session
from benchmarks.workloads import Workload, plan
from ceit.runtime.errors import UsageError

CPU = torch.device("cpu")
WORKLOAD = Workload("leff", "tiny", "training", "float32", 16)


def timed(implementation, seconds, peak=1000):
    # No two rounds are alike.
    ratio = Ratio(1.0, 1.0, 1.0)
    times = [seconds * (1 + 0.001 * i) for i in range(9)]
    return Entry(implementation, "timed", seconds=times, ratio=ratio, peak_bytes=peak)


def result(*entries):
    return Result(WORKLOAD, list(entries))


def target(speedup, memory=None, rivals=("plain", "compile"), ours="fused"):
    return Target(WORKLOAD, ours, rivals, speedup, memory)


def test_fastest_rival_counts():
    found = judge(target(1.5), result(timed("plain", 4.0), timed("compile", 2.0), timed("fused", 1.0)))
    assert (found.rival, found.verdict) == ("compile", "reached")
    assert found.ratio.value == pytest.approx(2.0)
    assert (
        judge(target(2.5), result(timed("plain", 4.0), timed("compile", 2.0), timed("fused", 1.0))).verdict == "missed"
    )


def test_interval_that_holds_the_target_leaves_it_open():
    noisy = Entry("fused", "timed", seconds=[0.5, 1.5, 0.5, 1.5, 1.0], peak_bytes=1)
    steady = Entry("plain", "timed", seconds=[1.0] * 5, peak_bytes=1)
    found = judge(target(1.0, rivals=("plain",)), result(steady, noisy))
    assert (found.verdict, found.reason) == ("open", "the interval holds the target")


def test_lacking_rival_leaves_a_reached_target_open_and_a_missed_one_missed():
    lacking = Entry("compile", "failed", "no compiler")
    found = judge(target(1.5), result(timed("plain", 2.0), lacking, timed("fused", 1.0)))
    assert (found.verdict, found.reason) == ("open", "compile failed: no compiler")
    assert judge(target(2.5), result(timed("plain", 2.0), lacking, timed("fused", 1.0))).verdict == "missed"


def test_memory_is_held_to_plain_pytorch():
    faster = [timed("plain", 2.0, peak=1000), timed("compile", 3.0, peak=100)]
    assert judge(target(1.5, memory=0.6), result(*faster, timed("fused", 1.0, peak=600))).verdict == "reached"
    found = judge(target(1.5, memory=0.6), result(*faster, timed("fused", 1.0, peak=601)))
    assert found.verdict == "missed"
    assert "0.60 (at most 0.60)" in target_rows([found])[1]


def test_refused_fused_operator_misses():
    refused = Entry("fused", "refused", "output: relative error 1e-01")
    found = judge(target(1.0), result(timed("plain", 1.0), timed("compile", 1.0), refused))
    assert (found.verdict, found.ratio) == ("missed", None)
    assert "relative error" in target_rows([found])[1][-1]


def test_targets_of_both_models_are_at_every_batch_that_the_plan_has_for_them():
    workloads = {b.workload for b in targets_of(CPU)}
    models = {(g.size, g.phase, g.batch) for g in workloads if (g.operator, g.dtype) == ("model", "float32")}
    inference = {(size, "inference", batch) for size in ("tiny", "small") for batch in (1, 16)}
    assert models == inference | {(size, "training", 8) for size in ("tiny", "small")}
    assert workloads <= set(plan(CPU))


def test_who_prepares_a_model_is_held_against_a_frozen_one_and_all_others_against_a_live_one(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.targets.has_bfloat16", lambda device: True)
    found, prepared = targets_of(CPU), {"compile-freezing", "openvino", "onnxruntime", "zentorch"}
    for b in found:
        assert b.ours == ("frozen" if prepared & set(b.rivals) else "fused"), b
        assert b.ours == "fused" or not {"plain", "compile"} & set(b.rivals), b
        assert b.implementations == ("plain", *(r for r in b.rivals if r != "plain"), b.ours)
    models = {b.workload for b in found if (b.workload.operator, b.workload.phase) == ("model", "inference")}
    for workload in (g for g in models if g.dtype == "float32"):
        assert {b.ours for b in found if b.workload == workload} == {"fused", "frozen"}


@pytest.mark.parametrize("missing", [["zentorch"], []], ids=["absent", "installed"])
def test_an_optional_rival_counts_where_it_is_installed(monkeypatch, missing):
    monkeypatch.setattr("benchmarks.harness.targets.missing_packages", lambda name: missing)
    monkeypatch.setattr("benchmarks.harness.targets.exceeding", lambda: None)
    for found in (targets_of(CPU), targets_of_others(CPU)):
        frozen = [t for t in found if t.ours == "frozen"]
        assert frozen
        assert all(("zentorch" in t.rivals) is not bool(missing) for t in frozen)


@pytest.mark.parametrize(
    ("code", "inference", "training"), [("avx512bf16", 1.0, 1.6), ("avx512", 1.0, 1.6), ("avx2", 1.15, 1.35)]
)
def test_targets_are_those_of_the_instructions_that_run(code, inference, training, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.targets.cpu_code", lambda: code)
    monkeypatch.setattr("benchmarks.harness.targets.has_bfloat16", lambda device: False)
    models = [t for t in targets_of(CPU) if t.workload.operator == "model"]
    assert {t.speedup for t in models if t.ours == "frozen"} == {inference}
    assert {t.speedup for t in models if t.workload.phase == "training"} == {training}


def test_everyone_can_be_held_to_fewer_instructions():
    code = """
import os
import torch
from benchmarks.harness.implementations import absence
from benchmarks.harness.instructions import instructions, limit_instructions
from benchmarks.workloads import Workload
limit_instructions("baseline")
why = absence("onnxruntime", Workload("leff", "tiny", "inference", "float32", 1), torch.device("cpu"))
print(instructions(), torch.backends.cpu.get_cpu_capability(), torch.cpu._is_avx2_supported(), why)
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("baseline DEFAULT"), done.stdout + done.stderr
    assert "True it runs" in done.stdout or "False" in done.stdout
    # Not that of runs without a limit, whose compiled models may not be run under it, nor the other way round.
    assert done.stdout.endswith("_baseline\n")


def test_instructions_cannot_be_taken_back_from_what_has_computed(monkeypatch):
    torch.ones(64).add(1)
    for name in _VARIABLES:
        monkeypatch.setenv(name, "")
    ran = torch.backends.cpu.get_cpu_capability().lower()
    with pytest.raises(UsageError, match=f"--instructions: expected PyTorch to run .*, it runs {ran}"):
        limit_instructions("baseline" if ran != "default" else "avx2")


def test_a_frozen_model_is_judged_by_its_own_time():
    times = result(timed("plain", 9.0), timed("openvino", 2.0), timed("fused", 3.0), timed("frozen", 1.0))
    found = judge(target(1.5, rivals=("openvino",), ours="frozen"), times)
    assert (found.verdict, found.ratio.value) == ("reached", pytest.approx(2.0))
    assert target_rows([found])[1][:3] == [WORKLOAD.name, "frozen", "openvino"]
    assert judge(target(1.0, rivals=("openvino",), ours="fused"), times).verdict == "missed"


def test_targets_of_one_workload_are_judged_of_one_measurement(monkeypatch):
    live, frozen = target(1.0, rivals=("compile",)), target(1.0, rivals=("openvino",), ours="frozen")
    monkeypatch.setattr(session, "targets_of", lambda device: [live, frozen])
    asked = []

    def measure(workload, device, *, seconds, implementations, clock):
        asked.append((workload, sorted(implementations)))
        return result(*(timed(name, 1.0 if name in ("fused", "frozen") else 2.0) for name in implementations))

    monkeypatch.setattr(session, "measure_workload", measure)
    run = Session(targets=True, device="cpu")
    assert [run.judge(it).verdict for it in run.targets] == ["reached", "reached"]
    assert asked == [(WORKLOAD, ["compile", "frozen", "fused", "openvino", "plain"])]


def test_missed_target_fails_the_run(monkeypatch):
    monkeypatch.setattr(session, "targets_of", lambda device: [target(1000.0, rivals=("plain",))])
    times = result(timed("plain", 1.0), timed("fused", 1.0))
    monkeypatch.setattr(session, "measure_workload", lambda *args, **kwargs: times)
    run = Session(targets=True, device="cpu")
    with pytest.raises(pytest.fail.Exception, match="missed"):
        suite.test_target(run, None, run.targets[0])
    assert "1000.00" in target_rows(run.judged)[1]


def test_targets_go_with_no_other_choice_of_workloads():
    with pytest.raises(UsageError, match="--targets: expected without"):
        Session(targets=True, quick=True, device="cpu")
