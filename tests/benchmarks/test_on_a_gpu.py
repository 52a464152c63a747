"""What `make bench` does on a CUDA machine: on one, or under ttsem with pretended events, graphs and profiler.

Under ttsem the Triton kernels run as the compiler has them, in the types that the plan of a GPU has.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from support import where
from support.fake_cuda import FakeCuda, FakeProfile

from benchmarks import __main__ as main
from benchmarks import readme, scaling
from benchmarks.harness import kernels, machine, measure, timing, usage, workloads
from benchmarks.harness.workloads import Workload

pytestmark = pytest.mark.kernels

PLAN = [
    Workload("leff", "tiny", "inference", "bfloat16", 2),
    Workload("leff", "tiny", "training", "float32", 1),
    Workload("lca", "tiny", "training", "bfloat16", 3),
    Workload("add_norm", "tiny", "training", "bfloat16", 2),
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
    for module in (kernels, usage):
        patch.setattr(module, "profile", FakeProfile)
    call = measure._call
    patch.setattr(measure, "_call", lambda step, inputs: cuda.timed(call(step, inputs)))
    patch.setattr(workloads, "_TOKENS", 1 + 3 * 3)
    patch.setitem(workloads._CHANNELS, "tiny", 64)
    patch.setattr(machine, "_GPU_SIZES", {"copy_bytes": 1 << 12, "product": 16})
    patch.setattr(kernels, "_ROUNDS", 1)
    patch.setattr(timing, "_WARMUP_CALLS", 1)


@pytest.fixture(scope="module")
def report(gpu, tmp_path_factory):
    """Folder of the report."""
    modelled = json.loads(readme.STORED.read_text())["modelled"]
    gpu.setattr(main, "plan", lambda device, quick: PLAN)
    gpu.setattr(main, "IMPLEMENTATIONS", ("plain", "rewrite", "openvino", "fused", "frozen"))
    gpu.setattr(main, "model_gpu", lambda: modelled)
    gpu.setattr(scaling, "_GPU_BATCHES", (1, 2))
    gpu.setattr(scaling, "AXES", {"batch": ()})
    gpu.setattr(scaling, "_workload", lambda axis, size, phase: Workload("add_norm", "tiny", phase, "bfloat16", size))
    folder = tmp_path_factory.mktemp("report")
    assert main.main(["--output", str(folder), "--minutes", "100"]) == 0
    return folder


def test_report_of_a_gpu(report):
    data = json.loads((report / "report.json").read_text())
    assert data["environment"]["device"] == "cuda"
    assert set(data["ceilings"]) == {"bfloat16", "float32"}
    assert [result["name"] for result in data["measured"]] == [workload.name for workload in PLAN]
    assert (data["failed"], data["left_out"], data["scaling_refused"]) == ([], [], [])
    for result in data["measured"]:
        assert result["rotating_inputs"] > 1
        for entry in result["entries"]:
            assert entry["status"] in ("timed", "absent"), entry
            if entry["status"] == "timed":
                assert entry["method"] == "CUDA events, graph replay"
                assert entry["peak_bytes"] is not None
                assert entry["launches"] is not None
    frozen = [e["status"] for r in data["measured"] for e in r["entries"] if e["implementation"] == "frozen"]
    assert frozen == ["timed", "absent", "absent", "absent"], "served is LeFF at inference"
    for name in ("roofline", "scaling", "ratios-leff", "ratios-norm"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_kernel_is_launched_as_often_as_it_is_counted_and_timed(report):
    data = json.loads((report / "report.json").read_text())
    for result in data["measured"]:
        fused = next(entry for entry in result["entries"] if entry["implementation"] == "fused")
        assert {by["backend"] for by in fused["backends"].values()} == {"triton"} | (
            {"reference"} if "linear" in fused["backends"] else set()
        )
        assert fused["unmatched"] == []
        assert fused["kernels"]
        assert all(kernel["seconds"] > 0 and kernel["bytes"] > 0 for kernel in fused["kernels"])
    text = (report / "report.md").read_text()
    assert "leff_contract_kernel" in text
    assert "lca_backward_scores_kernel" in text
