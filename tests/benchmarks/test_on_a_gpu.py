"""What `make bench` does on a CUDA machine: on one, or under ttsem with pretended events, graphs and profiler.

Under ttsem the Triton kernels run as the compiler has them, in the types that the plan of a GPU has.
"""

from types import SimpleNamespace

import pytest
import torch
from support import where
from support.bench_report import MODELLED
from support.fake_cuda import FakeCuda, FakeProfile

from benchmarks import gpu as gpu_run
from benchmarks import readme, session, workloads
from benchmarks.harness import machine, measure, timing, usage
from benchmarks.report import make_report, write_report
from benchmarks.results import Report
from benchmarks.session import Session
from benchmarks.workloads import Workload

pytestmark = pytest.mark.kernels

PLAN = [
    Workload("leff", "tiny", "inference", "bfloat16", 2, image_size=48),
    Workload("leff", "tiny", "training", "float32", 1, image_size=48),
    Workload("lca", "tiny", "training", "bfloat16", 3),
    Workload("add_norm", "tiny", "training", "bfloat16", 2, image_size=48),
]
SCALING = [
    Workload("add_norm", "tiny", phase, "bfloat16", batch, image_size=48, axis="batch")
    for phase in workloads.PHASES
    for batch in (1, 2)
]


@pytest.fixture(scope="module")
def gpu():
    """A patch of `torch.cuda` where there is no GPU, and sizes that ttsem executes in seconds."""
    if where.INTERPRETING:
        pytest.skip("the interpreter pretends no GPU")
    with pytest.MonkeyPatch.context() as patch:
        if not where.ON_GPU:
            _pretend(patch)
        yield patch


def _pretend(patch):
    cuda = FakeCuda()
    for name in ("Event", "CUDAGraph", "Stream", "stream", "current_stream", "graph", "graph_pool_handle"):
        patch.setattr(torch.cuda, name, getattr(cuda, name))
    patch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    properties = SimpleNamespace(L2_cache_size=1 << 10, multi_processor_count=132)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(usage, "profile", FakeProfile)
    run = measure._run
    patch.setattr(measure, "_run", lambda step, inputs, i: cuda.timed(lambda i: run(step, inputs, i))(i))
    patch.setenv("CEIT_KERNELS_MEASURE", "0")
    patch.setitem(workloads.SIZES, "tiny", 64)
    patch.setitem(machine._SIZES, "cuda", (1 << 12, 16))
    patch.setattr(usage, "_ROUNDS", 1)
    for name in ("_WARMUP_CALLS", "_EAGER_ROUNDS", "_EAGER_CALLS"):
        patch.setattr(timing, name, 1)
    patch.setattr(gpu_run, "_ROUNDS", 1)


@pytest.fixture(scope="module")
def folder(gpu, tmp_path_factory):
    """Where the report is."""
    gpu.setattr(session, "plan", lambda device, quick: list(PLAN))
    gpu.setattr(session, "scaling_plan", lambda device: SCALING)
    gpu.setattr(session, "IMPLEMENTATIONS", ("plain", "rewrite", "openvino", "fused", "frozen"))
    gpu.setattr("benchmarks.report.model_gpu", lambda: MODELLED)
    run = Session(minutes=100)
    for workload in run.cases:
        run.measure(workload)
    folder = tmp_path_factory.mktemp("report")
    write_report(make_report(run, "python -m benchmarks"), folder)
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return Report.load(folder / "report.json")


def test_report_of_a_gpu(folder, report):
    assert report.environment["device"] == "cuda"
    assert set(report.ceilings) == {"bfloat16", "float32"}
    assert [result.workload for result in report.results] == [*PLAN, *SCALING]
    assert report.left_out == []
    for result in report.results:
        assert result.rotating_inputs > 1
        for entry in result.entries:
            assert entry.status in ("timed", "absent"), entry
            if entry.status == "timed":
                assert entry.method == "CUDA events, graph replay"
                assert entry.peak_bytes is not None
                assert entry.launches is not None
                assert entry.wall_seconds >= entry.host_seconds > 0
    frozen = [result["frozen"].status for result in report.measured]
    assert frozen == ["timed", "absent", "absent", "absent"], "served is LeFF at inference"
    for name in ("roofline", "scaling", "ratios-leff", "ratios-add_norm"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_kernel_is_launched_as_often_as_it_is_counted_and_timed(folder, report):
    for result in report.results:
        fused = result["fused"]
        assert {by["backend"] for by in fused.backends.values()} == {"triton"} | (
            {"reference"} if "linear" in fused.backends else set()
        )
        assert fused.unmatched == []
        assert fused.kernels
        assert all(kernel["seconds"] > 0 and kernel["bytes"] > 0 for kernel in fused.kernels)
    text = (folder / "report.md").read_text()
    assert "leff_contract_kernel" in text
    assert "lca_backward_scores_kernel" in text


def test_make_gpu_takes_every_step_and_saves_each(gpu, tmp_path, capsys):
    """With times of a clock that is pretended, where there is no GPU, as the chip's name says."""
    gpu.setattr("benchmarks.report.model_gpu", lambda: MODELLED)
    # The stem's compiled kernels need a GPU, so no whole model.
    small = [Workload("add_norm", "tiny", "inference", "bfloat16", 1, image_size=32), PLAN[2]]
    measure = gpu_run.Run._measure
    steps = iter(small)
    gpu.setattr(
        gpu_run.Run, "_measure", lambda run, share, _, names: measure(run, share, [next(steps)], ("plain", "fused"))
    )
    # What is not captured by hand costs the pretended clock nothing.
    gpu.setattr(gpu_run.Run, "_seconds", lambda run, call: call() is not None and 1e-3)
    gpu.setattr(gpu_run, "_BATCH", 1)
    gpu.setattr(gpu_run, "SIZES", {"small": 64, "tiny": 32})
    ran = []

    def pytest_of(marked, path, limit):
        ran.append(marked)
        path.write_text("1 passed")
        return 0

    gpu.setattr(gpu_run, "_pytest", pytest_of)
    assert gpu_run.main(["--output", str(tmp_path), "--only", *(s for s in gpu_run.STEPS if s != "tiles")]) == 0
    assert ran == ["gpu and not prove", "kernels and not gpu and not prove"]
    out = capsys.readouterr().out
    assert "dz1^T x" in out
    assert "nothing failed" in out
    found = Report.load(tmp_path / "report.json")
    assert [result.workload for result in found.results] == small
    assert readme.results_rows(found)[1][-3] == "fused eager, ms"
    assert "bound, us" in (tmp_path / "report.md").read_text()


def test_a_step_of_make_gpu_that_fails_ends_alone(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "write_report", lambda *_: None)
    monkeypatch.setattr(gpu_run.Run, "_libraries", lambda run, share: 1 / 0)
    monkeypatch.setattr(gpu_run.Run, "_tiles", lambda run, share: run._keep("tiles", [["LeFF", "us"], ["leff", "1.0"]]))
    assert gpu_run.main(["--output", str(tmp_path), "--only", "libraries", "tiles"]) == 1
    assert "FAILED: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert "leff" in (tmp_path / "tiles.md").read_text()


def test_make_gpu_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_run.main([]) == 1
    assert capsys.readouterr().err == "error: no CUDA GPU is available to PyTorch\n"
