"""This checkout against another commit: two processes that take turns, and a verdict beyond the noise only."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ceit.runtime.errors import UsageError

from ..workloads import Workload
from .statistics import Ratio, median_ratio, verdict

_ROOT = Path(__file__).parents[2]
_MIN_ROUNDS, _MAX_ROUNDS = 9, 60


@dataclass
class Comparison:
    """A workload's verdict, by live modules ("fused") or by frozen ones.

    Attributes:
        workload: what is computed.
        implementation: "fused" or "frozen".
        base: what the other commit computed by: "fused" where it has no frozen modules.
        base_seconds: of a call, one for each round, with the other commit.
        head_seconds: likewise with this checkout.
        ratio: head / base, with its interval.
        verdict: "slower", "faster", "no difference beyond the noise", or why there is none.
    """

    workload: Workload
    implementation: str
    base: str = "-"
    base_seconds: list[float] = field(default_factory=list)
    head_seconds: list[float] = field(default_factory=list)
    ratio: Ratio | None = None
    verdict: str = ""


class Worker:
    """A process that times the fused modules of one checkout.

    Args:
        root: the checkout.

    Raises:
        RuntimeError: from `prepare` and `sample`, if the process fails at it.
    """

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONSAFEPATH": "1"},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def prepare(self, workload: Workload, implementation: str) -> str:
        """Make a workload's modules ready; returns the implementation that the checkout has for it."""
        return self._ask("prepare", asdict(workload), implementation)

    def sample(self) -> float:
        """Seconds of a call of what was prepared last."""
        return self._ask("sample")

    def _ask(self, *request: Any) -> Any:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process ended with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]


@contextmanager
def checkout(base: str) -> Iterator[Path]:
    """The commit `base` in a temporary worktree, with its native code compiled if this checkout has any.

    Raises:
        UsageError: there is no such commit, or no git.
    """
    with tempfile.TemporaryDirectory(prefix="ceit-bench-") as folder:
        root = Path(folder, "base")
        try:
            _git("worktree", "add", "--detach", str(root), base)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
            raise UsageError(f"--compare: cannot check out {base!r}: {reason}") from error
        try:
            if any(_ROOT.glob("ceit_kernels/*.so")):
                print(f"compiling the native code of {base}", flush=True)
                command = [sys.executable, "setup.py", "build_ext", "--inplace"]
                failed = subprocess.run(command, cwd=root, capture_output=True, check=False).returncode
                if failed or not any(root.glob("ceit_kernels/*.so")):
                    print("it did not compile: its fused operators run without native code", flush=True)
            yield root
        finally:
            _git("worktree", "remove", "--force", str(root))


def _git(*words: str) -> None:
    subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True)


def compare(base: Worker, head: Worker, workload: Workload, implementation: str, seconds: float) -> Comparison:
    """Time a workload in both processes by turns; the first sample of a round alternates between them.

    Args:
        base: the process of the other commit.
        head: the process of this checkout.
        workload: what is computed.
        implementation: "fused", or "frozen", against live modules where the other commit has no frozen ones.
        seconds: to spend.
    """
    comparison = Comparison(workload, implementation)
    for worker, where in ((head, "this checkout"), (base, "base")):
        try:
            comparison.base = worker.prepare(workload, implementation)
        except RuntimeError as error:
            comparison.verdict = f"not comparable, {where}: {error}"
            return comparison
    turns = [(base, comparison.base_seconds), (head, comparison.head_seconds)]
    start = time.perf_counter()
    for done in range(_MAX_ROUNDS):
        if done >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for worker, times in turns:
            times.append(worker.sample())
        turns.reverse()
    comparison.ratio = median_ratio(comparison.head_seconds, comparison.base_seconds)
    comparison.verdict = verdict(comparison.ratio)
    return comparison


def comparison_rows(comparisons: list[Comparison]) -> list[list[str]]:
    """The comparisons as rows of a table, with the head."""
    rows = [["workload", "head", "ms", "base", "ms", "head / base", "99% interval", "verdict"]]
    for it in comparisons:
        head, base, ratio = ["-", "-", ["-", "-"]]
        if it.ratio is not None:
            head, base = (f"{1e3 * median(times):,.2f}" for times in (it.head_seconds, it.base_seconds))
            ratio = it.ratio.cells()
        rows.append([it.workload.name, it.implementation, head, it.base, base, *ratio, it.verdict])
    return rows
