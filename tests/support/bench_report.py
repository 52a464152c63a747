"""A report of the benchmarks as a run on a CPU would make it, with times that nobody measured."""

from benchmarks.harness.measure import Entry, Result
from benchmarks.harness.statistics import Ratio
from benchmarks.results import Report
from benchmarks.workloads import Workload, plan, scaling_plan

ENVIRONMENT = {
    "device": "cpu",
    "chip": "a chip",
    "threads": 2,
    "cores": 2,
    "system": "Linux",
    "versions": {"torch": "2.14.1"},
    "commit": "0123456789ab",
    "backends": [{"operator": "leff", "device": "cpu", "backend": "native", "reason": "the fastest that can run"}],
}
MODELLED = {
    "rows": [
        {
            "operator": "leff",
            "size": "tiny",
            "phase": "inference",
            "implementation": "fused",
            "launches": 2,
            "bytes": 10**8,
            "flops": 10**10,
            "modelled_seconds": 4e-5,
        }
    ],
    "kernels": [
        {"operator": "leff", "phase": "inference", "bytes": 10**8, "flops": flops, "modelled_seconds": 4e-5}
        for flops in (10**10, 0)
    ],
    "compile_missing": "",
    "assumptions": {
        "bytes_per_second": 3e12,
        "flops_per_second": 8e14,
        "launch_seconds": 2e-6,
        "batch": 256,
        "dtype": "bfloat16",
    },
}


def make_result(workload: Workload, times: dict[str, float]) -> Result:
    """A result with seconds by implementation, plain's among them."""
    seconds = {name: [time * (1 + 0.01 * i) for i in range(5)] for name, time in times.items()}
    entries = []
    for name, rounds in seconds.items():
        ratio = Ratio(*[times["plain"] / times[name]] * 3)
        entries.append(Entry(name, "timed", "", rounds, ratio, "wall clock", peak_bytes=1000 * workload.batch))
    entries[-1].backends = {"leff": {"backend": "native", "reason": "the fastest that can run"}}
    return Result(workload, [*entries, Entry("mlp", "absent", "there is none")], 10**9, 10**7, 1)


def make_report(device) -> Report:
    """The first workloads of a device, and those of the scaling curves."""
    results = [make_result(w, {"plain": 0.2, "compile": 0.15, "fused": 0.1}) for w in plan(device)[:8]]
    results += [make_result(w, {"plain": 0.1 * w.batch, "fused": 0.05 * w.batch}) for w in scaling_plan(device)]
    ceilings = {dtype: {"bytes_per_second": 1e10, "flops_per_second": 1e11} for dtype in ("float32", "bfloat16")}
    return Report("python -m benchmarks", ENVIRONMENT, ceilings, results, [], MODELLED, 60.0)
