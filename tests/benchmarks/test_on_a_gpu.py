"""What `make bench` does on a CUDA machine: on one, or under ttsem with pretended events, graphs and profiler.

Under ttsem the Triton kernels run as the compiler has them, in the types that the plan of a GPU has.
"""

from types import SimpleNamespace

import pytest
import torch
from support import where
from support.bench_report import MODELLED
from support.fake_cuda import FakeCuda, FakeProfile

from benchmarks import session, workloads
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
    patch.setitem(workloads.SIZES, "tiny", 64)
    patch.setitem(machine._SIZES, "cuda", (1 << 12, 16))
    patch.setattr(usage, "_ROUNDS", 1)
    patch.setattr(timing, "_WARMUP_CALLS", 1)


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
