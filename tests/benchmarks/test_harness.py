"""A wrong fused operator is refused, a slowed one is caught, and nobody disappears."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import test_benchmarks as suite
from benchmarks.harness import compare, implementations, measure
from benchmarks.harness.checking import check_outputs
from benchmarks.harness.measure import Clock, measure_workload, result_rows
from benchmarks.harness.statistics import Ratio
from benchmarks.harness.usage import peak_memory
from benchmarks.session import Session, select_workloads
from benchmarks.tables import format_table
from benchmarks.workloads import Workload, plan
from ceit.runtime.errors import UsageError
from ceit_kernels import Frozen, FusedLCAAttention, FusedLeFF

CPU = torch.device("cpu")
LCA = Workload("lca", "tiny", "training", "float32", 2)
ROOT = Path(__file__).parents[2]


def entry(workload, implementation, **kwargs):
    return measure_workload(workload, CPU, seconds=0.01, implementations=[implementation], **kwargs)[implementation]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def test_right_fused_operator_is_timed_and_its_backend_named():
    found = entry(LCA, "fused")
    assert found.status == "timed"
    assert len(found.seconds) >= 5
    assert found.backends["lca"]["backend"]
    assert found.peak_bytes > 0
    assert found.saved_bytes > 0


@pytest.mark.parametrize(("wrong", "where"), [(lambda x: 1.01 * x, "output"), (_WrongGradient.apply, "gradient of")])
def test_wrong_fused_operator_is_refused(monkeypatch, wrong, where):
    right = FusedLCAAttention.forward
    monkeypatch.setattr(FusedLCAAttention, "forward", lambda self, x: wrong(right(self, x)))
    found = entry(LCA, "fused")
    assert found.status == "refused"
    assert where in found.reason
    assert found.seconds == []
    assert found.ratio is None


def test_run_fails_for_a_wrong_operator(monkeypatch):
    monkeypatch.setattr(FusedLeFF, "forward", lambda self, x, *_: 2 * x)
    session = Session(quick=True, only="leff-tiny-inference", seconds=0.01, device="cpu")
    (workload,) = session.cases
    session.cases[workload] = ["plain", "fused"]
    with pytest.raises(pytest.fail.Exception, match="fused refused: output"):
        suite.test_time(session, None, workload, "fused")
    assert "refused: output" in format_table(result_rows(session.results[workload]))


def test_implementation_that_cannot_run_is_listed(monkeypatch):
    def fail(module, by):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr("benchmarks.harness.rewrite.rewrite", fail)
    found = entry(Workload("leff", "tiny", "inference", "float32", 1), "rewrite")
    assert (found.status, found.reason) == ("failed", "RuntimeError: no compiler")


def test_implementation_that_is_not_installed_is_listed(monkeypatch):
    monkeypatch.setattr(implementations, "missing_packages", lambda name: ["openvino"])
    found = entry(Workload("leff", "tiny", "inference", "float32", 1), "openvino")
    assert found.status == "absent"
    assert "not installed: openvino" in found.reason


@pytest.mark.parametrize(
    "workload",
    [
        Workload("leff", "tiny", "inference", "float32", 1),
        Workload("model", "tiny", "inference", "float32", 1, image_size=32, depth=1),
    ],
    ids=["leff", "model"],
)
def test_a_frozen_module_is_timed_beside_the_live_one_and_its_backend_named(workload):
    found = entry(workload, "frozen")
    assert found.status == "timed", found.reason
    assert found.backends == entry(workload, "fused").backends


def test_training_and_parts_that_are_not_served_have_no_frozen_implementation():
    for workload in (
        Workload("leff", "tiny", "training", "float32", 1),
        Workload("add_norm", "tiny", "inference", "float32", 1),
    ):
        found = entry(workload, "frozen")
        assert (found.status, found.reason) == ("absent", "taken for inference of LeFF and of whole models only")


def test_a_wrong_frozen_module_is_refused(monkeypatch):
    monkeypatch.setattr(Frozen, "forward", lambda self, x: 1.01 * self.model(x))
    assert entry(Workload("leff", "tiny", "inference", "float32", 1), "frozen").status == "refused"


def test_costly_implementations_are_left_out_with_the_reason_when_time_is_short():
    clock = Clock(1e-9)
    found = entry(Workload("leff", "tiny", "inference", "float32", 1), "compile-freezing", clock=clock)
    assert found.status == "absent"
    assert "--only leff-tiny-inference-float32-b1" in found.reason


def test_freezing_of_a_large_model_waits_for_a_run_without_limit():
    large = Workload("model", "tiny", "inference", "float32", 2, image_size=32, depth=1)
    assert entry(large, "compile-freezing", clock=Clock(1e6)).status == "absent"
    assert implementations.absence("compile-freezing", large, CPU) is None


def test_implementation_that_runs_out_of_memory_later_is_listed(monkeypatch):
    class Timer:
        def prepare(self, call, num_inputs, spinning):
            self.prepared = getattr(self, "prepared", 0) + 1
            if self.prepared > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
            return make_timer(CPU).prepare(call, num_inputs, spinning)

    make_timer = measure.make_timer
    monkeypatch.setattr(measure, "make_timer", lambda device: Timer())
    found = entry(LCA, "fused")
    assert (found.status, found.reason) == ("failed", "OutOfMemoryError: CUDA out of memory.")


def test_peak_memory_counts_what_is_there_at_once():
    kilobyte = 1 << 10

    def call():
        first = torch.empty(300 * kilobyte, dtype=torch.uint8)
        second = torch.empty(500 * kilobyte, dtype=torch.uint8)
        del first, second
        return torch.empty(600 * kilobyte, dtype=torch.uint8)

    assert peak_memory(call, CPU) == pytest.approx(800 * kilobyte, rel=1e-3)


def test_peak_memory_of_training_includes_the_gradients():
    module = LCA.make_module()
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    assert entry(LCA, "fused").peak_bytes > parameters


@pytest.mark.parametrize("operator", ["leff", "i2t"])
@pytest.mark.parametrize("phase", ["inference", "training"])
def test_rewrite_computes_the_same(operator, phase):
    assert entry(Workload(operator, "tiny", phase, "float32", 2, image_size=64), "rewrite").status == "timed"


def test_missing_gradient_is_wrong_and_nan_is_wrong():
    one = torch.ones(3)
    assert check_outputs(one, one, {}, {"w": one}, "float32") == "gradient of w: there is none"
    assert check_outputs(one, one, {}, {"w": 0 * one}, "float32") == ""
    assert "nan" in check_outputs(one * float("nan"), one, {}, {}, "float32")


def test_inputs_rotate_through_more_than_a_gpus_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    workload = Workload("leff", "tiny", "inference", "bfloat16", 64)
    count = measure._num_inputs(workload, torch.device("cuda"))
    assert count * 64 * 197 * 192 * 2 >= 2 * (50 << 20)


def test_plan_of_a_gpu_has_both_dtypes_and_all_operators():
    workloads = plan(torch.device("cuda"))
    assert {g.dtype for g in workloads} == {"bfloat16", "float32"}
    assert {g.operator for g in workloads} == {"leff", "i2t", "lca", "add_norm", "model"}
    assert len({g.name for g in workloads}) == len(workloads)


def test_exact_name_chooses_one_workload():
    workloads = [Workload("leff", "tiny", "inference", "float32", batch) for batch in (1, 16)]
    assert select_workloads(workloads, workloads[0].name) == workloads[:1]
    assert select_workloads(workloads, "leff") == workloads


def test_models_of_other_libraries_are_measured_where_they_are_asked_for():
    cases = Session(only="others", device="cpu").cases
    assert {w.operator for w in cases} == {"others"}
    assert len({w.name for w in cases}) == len(cases)
    assert not {w.operator for w in plan(CPU) + plan(CPU, quick=True)} & {"others"}
    targets = Session(only="others", targets=True, device="cpu").targets
    assert {(t.workload.phase, t.ours, t.speedup) for t in targets} == {
        ("inference", "fused", 1.15),
        ("inference", "frozen", 1.0),
        ("training", "fused", 1.2),
    }
    assert {t.workload for t in targets} == set(cases)
    small = Workload("others", "mobilenetv2_100", "inference", "float32", 1, 32)
    assert entry(small, "frozen").status == "timed"
    assert implementations.absence("mlp", small, CPU) == "there is nothing of CeiT in it"


def test_slower_commit_fails_the_run(monkeypatch):
    slower = compare.Comparison(LCA, "fused", "fused", [1.0], [2.0], Ratio(2.0, 2.0, 2.0), "slower")
    monkeypatch.setattr("benchmarks.session.compare", lambda *args: slower)
    session = Session(compare="main", quick=True, device="cpu")
    with pytest.raises(pytest.fail.Exception, match="slower beyond the noise"):
        suite.test_commit(session, None, (None, None), LCA, "fused")
    assert compare.comparison_rows(session.comparisons)[1][-1] == "slower"


def test_unknown_workload():
    with pytest.raises(UsageError, match="--only: no workload"):
        Session(only="nothing", device="cpu")


@pytest.fixture
def two_copies(tmp_path):
    """Two copies of the packages, in the folders base and head."""
    for name in ("base", "head"):
        for package in ("ceit", "ceit_kernels"):
            shutil.copytree(ROOT / package, tmp_path / name / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_slowed_fused_operator_is_caught(two_copies):
    """One of the copies has a fused attention that waits."""
    slowed = two_copies / "head" / "ceit_kernels" / "lca" / "module.py"
    slowed.write_text(
        slowed.read_text()
        + "\n_right = FusedLCAAttention.forward\n\n\ndef _slow(self, x):\n    import time\n\n"
        + "    time.sleep(0.05)\n    return _right(self, x)\n\n\nFusedLCAAttention.forward = _slow\n"
    )
    workload = Workload("lca", "tiny", "inference", "float32", 2)
    with compare.Worker(two_copies / "base") as base, compare.Worker(two_copies / "head") as head:
        result = compare.compare(base, head, workload, "fused", seconds=1.0)
    assert result.verdict == "slower"
    assert len(result.base_seconds) == len(result.head_seconds) >= 9


@pytest.mark.parametrize("base_freezes", [pytest.param(True, marks=pytest.mark.prove), False])
def test_frozen_modules_are_compared_with_live_ones_where_the_base_has_no_frozen(two_copies, base_freezes, monkeypatch):
    monkeypatch.setattr(compare, "_MIN_ROUNDS", 1)
    if not base_freezes:
        public = two_copies / "base" / "ceit_kernels" / "__init__.py"
        public.write_text(public.read_text() + "\ndel freeze\n")
    workload = Workload("leff", "tiny", "inference", "float32", 1)
    with compare.Worker(two_copies / "base") as base, compare.Worker(two_copies / "head") as head:
        results = [compare.compare(base, head, workload, it, seconds=0.0) for it in ("fused", "frozen")]
    assert all(result.ratio is not None for result in results), [result.verdict for result in results]
    assert [result.base for result in results] == ["fused", "frozen" if base_freezes else "fused"]


def test_modules_are_compared_live_and_what_is_served_frozen_too():
    cases = Session(compare="main", quick=True, only="inference", device="cpu").cases
    assert {w.operator: names for w, names in cases.items() if w.operator in ("leff", "lca")} == {
        "leff": ["fused", "frozen"],
        "lca": ["fused"],
    }


def test_unknown_base():
    with (
        pytest.raises(UsageError, match="--compare: cannot check out 'no-such-commit'"),
        compare.checkout("no-such-commit"),
    ):
        pass


def test_suite_gives_the_measured_times_to_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q", "-p", "no:xdist"]
    chosen = "lca-tiny-inference and (plain or fused or rewrite)"
    # Of a test process among several, pytest-benchmark would time nothing.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run([*command, "-k", chosen], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    assert "no convolution" in done.stdout
