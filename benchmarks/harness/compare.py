"""This checkout against another commit: two processes that take turns, and a verdict beyond the noise only."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ceit.runtime.options import UsageError

from .statistics import Ratio, median_ratio, verdict
from .workloads import Workload

__all__ = ["Comparison", "Worker", "checkout", "compare_commits", "compare_workloads"]

_ROOT = Path(__file__).parents[2]
_WORKER = Path(__file__).with_name("worker.py")
_MIN_ROUNDS, _MAX_ROUNDS = 9, 60


@dataclass(frozen=True)
class Comparison:
    """A workload's verdict, for its live modules or for frozen ones.

    Attributes:
        name: of the workload, with "frozen" behind it for these.
        base_seconds: of a call, one for each round, with the other commit.
        head_seconds: likewise with this one.
        ratio: head / base, with its interval.
        verdict: "slower", "faster", "no difference beyond the noise", or why there is none.
    """

    name: str
    base_seconds: list[float]
    head_seconds: list[float]
    ratio: Ratio | None
    verdict: str


class Worker:
    """A process that times the fused modules of one checkout.

    Args:
        root: the checkout.

    Raises:
        RuntimeError: from `freezes`, `prepare` and `sample`, if the process fails at it.
    """

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def freezes(self) -> bool:
        """Whether the checkout has `ceit_kernels.freeze`."""
        return self._ask(["freezes"])["freezes"]

    def prepare(self, workload: Workload, *, frozen: bool = False) -> None:
        """Make the workload's fused modules ready, live or frozen."""
        self._ask(["prepare", asdict(workload), frozen])

    def sample(self) -> float:
        """Seconds of a call of what was prepared last."""
        return self._ask(["sample"])["seconds"]

    def _ask(self, request: list[Any]) -> dict[str, Any]:
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
        return answer


@contextmanager
def checkout(base: str, say: Callable[[str], None]) -> Iterator[Path]:
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
                say(f"compiling the native code of {base}")
                _compile(root, say)
            yield root
        finally:
            _git("worktree", "remove", "--force", str(root))


def _git(*words: str) -> None:
    subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True)


def _compile(root: Path, say: Callable[[str], None]) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode or not any(root.glob("ceit_kernels/*.so")):
        say("it did not compile: its fused operators run without native code")


def compare_commits(
    base: str, workloads: Sequence[Workload], *, seconds: float, say: Callable[[str], None]
) -> list[Comparison]:
    """Compare this checkout, changes included, with the commit `base`.

    Args:
        base: a commit, branch or tag.
        workloads: what to time; the fused modules of each, live, and frozen as well where both commits freeze.
        seconds: to spend on each workload, live and frozen alike.
        say: takes lines of progress.

    Raises:
        UsageError: `base` cannot be checked out.
    """
    with checkout(base, say) as root:
        return compare_workloads(root, _ROOT, workloads, seconds=seconds, say=say)


def compare_workloads(
    base: Path, head: Path, workloads: Sequence[Workload], *, seconds: float, say: Callable[[str], None]
) -> list[Comparison]:
    """Compare two checkouts; the first sample of a round alternates between them. Arguments as of `compare_commits`."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(root)) for root in (base, head)]
        results, both_freeze = [], all(worker.freezes() for worker in workers)
        for workload in workloads:
            for frozen in (False, True) if both_freeze and workload.served else (False,):
                results.append(_compare(workers, workload, seconds, frozen))
                ratio = results[-1].ratio
                interval = "" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] "
                say(f"{results[-1].name}: {interval}{results[-1].verdict}")
        return results


def _compare(workers: Sequence[Worker], workload: Workload, seconds: float, frozen: bool) -> Comparison:
    name = f"{workload.name} frozen" if frozen else workload.name
    times: tuple[list[float], list[float]] = [], []
    for worker, where in zip(workers, ("base", "this checkout"), strict=True):
        try:
            worker.prepare(workload, frozen=frozen)
        except RuntimeError as error:
            return Comparison(name, [], [], None, f"not comparable, {where}: {error}")
    start = time.perf_counter()
    for done in range(_MAX_ROUNDS):
        if done >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for i in (0, 1) if done % 2 == 0 else (1, 0):
            times[i].append(workers[i].sample())
    ratio = median_ratio(times[1], times[0])
    return Comparison(name, *times, ratio, verdict(ratio))
