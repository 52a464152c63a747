"""What a machine with an NVIDIA GPU can tell, the most telling first: `make gpu`, or `python -m benchmarks.gpu`.

Each step prints what it found and saves it at once, so that a run that is cut short counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ceit.runtime.files import write_atomically, write_json
from ceit_kernels import autotune

from .harness.implementations import build, first_line
from .harness.machine import environment, measure_ceilings
from .harness.measure import Clock, measure_workload, result_rows
from .harness.timing import CudaTimer
from .report import write_report
from .results import Report
from .tables import format_table
from .workloads import PHASES, SIZES, Workload

_ROOT = Path(__file__).parents[1]
_DTYPE, _BATCH, _BATCHES = "bfloat16", 256, (256, 64, 1)
_MODEL = ("plain", "compile", "compile-reduce-overhead", "fused", "frozen")
_OPERATOR = ("plain", "compile", "fused", "frozen")
_ROUNDS = 7
# By step: of the run's time, when the next one begins at the latest.
_SHARES = {"tests": 0.25, "models": 0.6, "operators": 0.85, "libraries": 0.9, "tiles": 1.0}
STEPS = tuple(_SHARES)


class Run:
    """A run, and what it has found so far.

    Args:
        folder: where it is saved.
        minutes: after which nothing new begins.

    Attributes:
        failures: what went wrong, in a line each.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.clock, self.failures = folder, Clock(60 * minutes), list[str]()
        self._device, self._timer = torch.device("cuda"), CudaTimer()
        ceilings = {_DTYPE: measure_ceilings(self._device, getattr(torch, _DTYPE))}
        self.report = Report("make gpu", environment(self._device), ceilings, [], [], {}, 0.0)
        folder.mkdir(parents=True, exist_ok=True)
        copied, multiplied = ceilings[_DTYPE].values()
        versions = ", ".join(f"{name} {version}" for name, version in self.report.environment["versions"].items())
        print(f"{self.report.environment['chip']}; {versions}", flush=True)
        print(f"copy {copied / 1e12:.2f} TB/s, matmul in {_DTYPE} {multiplied / 1e12:.0f} TFLOP/s", flush=True)

    def run(self, step: str) -> None:
        """Take a step; an error ends it alone."""
        print(f"\n== {step} ({self.clock.spent / 60:.1f} minutes so far)", flush=True)
        try:
            getattr(self, f"_{step}")(_SHARES[step])
        except Exception as error:
            self._fail(step, first_line(error))
        self.save()

    def save(self) -> None:
        """Write what was found so far to `report.json`, which `python -m benchmarks --redraw` makes pages of."""
        self.report.seconds = self.clock.spent
        write_json(self.folder / "report.json", asdict(self.report))

    def _fail(self, step: str, reason: str) -> None:
        self.failures.append(f"{step}: {reason}")
        print(f"FAILED: {reason}", flush=True)

    def _keep(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Print a table and save it."""
        print(format_table(rows), flush=True)
        text = format_table(rows, markdown=True) + "\n"
        write_atomically(self.folder / f"{name}.md", lambda file: file.write(text.encode()))

    def _tests(self, share: float) -> None:
        """Those that only a GPU runs, then those of the kernels, as far as the step's time goes."""
        for marked in ("gpu", "kernels and not gpu"):
            limit = max(1.0, share * self.clock.seconds - self.clock.spent)
            path = self.folder / f"tests-{marked.split()[0]}.txt"
            status = _pytest(f"{marked} and not prove", path, limit)
            lines = path.read_text().splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            outcome = f"cut after {limit:.0f} s" if status is None else f"exit status {status}"
            print(f"pytest -m {marked!r}: {outcome}", *failed, *lines[-1:], sep="\n", flush=True)
            if failed or status not in (0, 5, None):  # 5: there were none
                self._fail("tests", f"{path.name}: {len(failed)} failed, {outcome}")

    def _models(self, share: float) -> None:
        phases = [(batch, size, phase) for batch in _BATCHES for phase in PHASES for size in ("small", "tiny")]
        self._measure(share, [Workload("model", size, phase, _DTYPE, n) for n, size, phase in phases], _MODEL)

    def _operators(self, share: float) -> None:
        names = [("leff", size) for size in ("small", "tiny")]
        names += [("i2t", "tiny"), ("lca", "small"), ("add_norm", "small")]
        workloads = [Workload(name, size, phase, _DTYPE, _BATCH) for name, size in names for phase in PHASES]
        self._measure(share, workloads, _OPERATOR)

    def _measure(self, share: float, workloads: Sequence[Workload], implementations: Sequence[str]) -> None:
        for workload in workloads:
            if self.clock.used(share):
                self.report.left_out.append(workload.name)
                continue
            result = measure_workload(workload, self._device, seconds=2.0, implementations=implementations)
            self.report.results.append(result)
            self.save()
            print(f"\n{workload.name}\n{format_table(result_rows(result))}", flush=True)
            for entry in (e for e in result.entries if e.status in ("refused", "failed")):
                self._fail(workload.name, f"{entry.implementation} {entry.status}: {entry.reason}")

    def _libraries(self, share: float) -> None:
        """The GEMMs of a LeFF block by PyTorch's libraries: what kernels of our own compete with."""
        ceiling = self.report.ceilings[_DTYPE]["flops_per_second"]
        rows = [["GEMM", "size", "us", "TFLOP/s", "of the ceiling"]]
        for size in ("small", "tiny"):
            for name, call, flops in _gemms(SIZES[size], self._device):
                seconds = self._seconds(call)
                rate = flops / seconds
                rows.append([name, size, f"{1e6 * seconds:.1f}", f"{rate / 1e12:.0f}", f"{rate / ceiling:.2f}"])
        self._keep("libraries", rows)

    def _tiles(self, share: float) -> None:
        """LeFF by the tiles of the table, and by those that tuning finds on this GPU."""
        rows = [["LeFF", "by the table, us", "tuned, us"]]
        with _tuning_cache(self.folder / "tiles.json"):
            for size, phase in ((size, phase) for size in ("small", "tiny") for phase in PHASES):
                workload = Workload("leff", size, phase, _DTYPE, _BATCH)
                if self.clock.used(share):
                    self.report.left_out.append(f"tiles of {workload.name}")
                    continue
                x = workload.make_inputs(1, self._device)[0]
                step = build("fused", workload, workload.make_module().to(self._device, workload.torch_dtype), x)
                times = [self._seconds(partial(step.run, x))]
                with autotune():
                    times.append(self._seconds(partial(step.run, x)))
                rows.append([workload.name, *(f"{1e6 * seconds:.1f}" for seconds in times)])
        self._keep("tiles", rows)

    def _seconds(self, call: Callable[[], object]) -> float:
        sampler = self._timer.prepare(lambda _: call(), 1)
        return median(sampler.sample() for _ in range(_ROUNDS))


def _pytest(marked: str, path: Path, limit: float) -> int | None:
    """The exit status of the tests with a mark, whose output goes to a file; None if they were cut."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", marked, "tests"]
    with path.open("w") as file:
        try:
            return subprocess.run(command, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return None


def _gemms(channels: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Tensor], int]]:
    """Name, call and FLOPs of the GEMMs of a LeFF block over `_BATCH` images."""
    tokens, hidden = _BATCH * 196, 4 * channels

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=getattr(torch, _DTYPE))

    x, h = random(tokens, channels), random(tokens, hidden)
    expand, contract, bias1, bias3 = (
        random(*s) for s in ((hidden, channels), (channels, hidden), (hidden,), (channels,))
    )
    calls: dict[str, Callable[[], Tensor]] = {
        "x W1^T + b": lambda: F.linear(x, expand, bias1),
        "h W3^T + b": lambda: F.linear(h, contract, bias3),
        "h W3^T + residual": lambda: torch.addmm(x, h, contract.t()),
        "dz3 W3": lambda: x @ contract,
        "dz1 W1": lambda: h @ expand,
        "dz1^T x": lambda: h.t() @ x,
        "dz3^T h": lambda: x.t() @ h,
    }
    for name, call in calls.items():
        yield name, call, 2 * tokens * channels * hidden
    yield "x^T x", lambda: x.t() @ x, 2 * tokens * channels * channels


@contextmanager
def _tuning_cache(path: Path) -> Iterator[None]:
    """What tuning finds goes to a file of this run."""
    name = "CEIT_KERNELS_TUNING_CACHE"
    before = os.environ.get(name)
    os.environ[name] = str(path)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps; returns 0, or 1 if something failed, was refused or cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="DIR", default="runs/gpu", help="where the results go (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=20.0, metavar="M", help="start nothing new after (%(default)g)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=f"some of {', '.join(STEPS)}"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU is available to PyTorch", file=sys.stderr)
        return 1
    run = Run(Path(options.output), options.minutes)
    for step in STEPS:
        if step in options.only:
            run.run(step)
    write_report(run.report, run.folder)
    print(
        f"\n{run.folder / 'report.md'}; for docs/performance.md: python -m benchmarks.readme {run.folder}/report.json"
    )
    print("\n".join(run.failures or ["nothing failed"]))
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
