"""A wrong fused operator is refused, a slowed one is caught, and nobody disappears."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import command, compare, implementations, measure
from benchmarks.harness.checking import check_outputs
from benchmarks.harness.command import BenchFailed, BenchOptions, bench, select_workloads
from benchmarks.harness.measure import Clock, measure_workload
from benchmarks.harness.usage import peak_memory
from benchmarks.harness.workloads import Workload, plan
from ceit.runtime.options import UsageError
from ceit_kernels import Frozen, FusedLCAAttention, FusedLeFF

CPU = torch.device("cpu")
LCA = Workload("lca", "tiny", "training", "float32", 2)
ROOT = Path(__file__).parents[2]


def entry(workload, implementation, **kwargs):
    result = measure_workload(workload, CPU, seconds=0.01, implementations=[implementation], **kwargs)
    return next(entry for entry in result.entries if entry.implementation == implementation)


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


def test_command_fails_for_a_wrong_operator(monkeypatch, capsys):
    monkeypatch.setattr(FusedLeFF, "forward", lambda self, x, *_: 2 * x)
    monkeypatch.setattr("benchmarks.harness.command.IMPLEMENTATIONS", ("plain", "fused"))
    with pytest.raises(BenchFailed, match="leff-tiny-inference"):
        bench(BenchOptions(quick=True, only="leff-tiny-inference", seconds=0.01, device="cpu"))
    assert "refused: output" in capsys.readouterr().out


def test_implementation_that_cannot_run_is_listed(monkeypatch):
    def fail(module):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(implementations, "rewrite", fail)
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
        Workload("model", "tiny", "inference", "float32", 1, image_size=32, model_kwargs={"depth": 1}),
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
    large = Workload("model", "tiny", "inference", "float32", 2, image_size=32, model_kwargs={"depth": 1})
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
    assert check_outputs(one, one, {}, {"w": 0 * one}, "float32") is None
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


def test_slower_commit_fails_the_command(monkeypatch):
    slower = compare.Comparison("lca-tiny", [1.0], [2.0], None, "slower")
    monkeypatch.setattr(command, "compare_commits", lambda *args, **kwargs: [slower])
    with pytest.raises(BenchFailed, match="slower beyond the noise: lca-tiny"):
        bench(BenchOptions(compare="main", quick=True, device="cpu"))


def test_unknown_workload():
    with pytest.raises(UsageError, match="--only: no workload"):
        bench(BenchOptions(only="nothing", device="cpu"))


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
    said = []
    workload = Workload("lca", "tiny", "inference", "float32", 2)
    (result,) = compare.compare_workloads(
        two_copies / "base", two_copies / "head", [workload], seconds=1.0, say=said.append
    )
    assert result.verdict == "slower"
    assert len(result.base_seconds) == len(result.head_seconds) >= 9
    assert "slower" in said[0]


@pytest.mark.parametrize("base_freezes", [True, False])
def test_commits_are_compared_frozen_where_both_of_them_freeze(two_copies, base_freezes, monkeypatch):
    monkeypatch.setattr(compare, "_MIN_ROUNDS", 1)
    if not base_freezes:
        public = two_copies / "base" / "ceit_kernels" / "__init__.py"
        public.write_text(public.read_text() + "\ndel freeze\n")
    workloads = [
        Workload("leff", "tiny", "inference", "float32", 1),
        Workload("add_norm", "tiny", "inference", "float32", 1),
    ]
    results = compare.compare_workloads(
        two_copies / "base", two_copies / "head", workloads, seconds=0.0, say=lambda line: None
    )
    frozen = [f"{workloads[0].name} frozen"] if base_freezes else []
    assert [result.name for result in results] == [workloads[0].name, *frozen, workloads[1].name]
    assert all(result.ratio is not None for result in results), [result.verdict for result in results]


def test_unknown_base():
    with pytest.raises(UsageError, match="--compare: cannot check out 'no-such-commit'"):
        bench(BenchOptions(compare="no-such-commit", quick=True, device="cpu"))


def test_suite_gives_the_measured_times_to_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q", "-p", "no:xdist"]
    chosen = "lca-tiny-inference and (plain or fused or rewrite)"
    # Of a test process among several, pytest-benchmark would time nothing.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run([*command, "-k", chosen], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    assert "no convolution" in done.stdout
