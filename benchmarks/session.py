"""A run of the benchmarks: its options, what it measures, and what it has measured so far."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ceit.runtime.errors import UsageError

from .harness.compare import Comparison, Worker, compare
from .harness.implementations import COSTLY, IMPLEMENTATIONS
from .harness.instructions import INSTRUCTIONS, limit_instructions
from .harness.measure import Clock, Result, measure_workload
from .harness.targets import Target, TargetResult, judge, targets_of, targets_of_others
from .workloads import OTHERS, Workload, others_plan, plan, scaling_plan

_MINUTES = 12.0
# Of the run's time for all but the scaling curves, which come last.
_WORKLOADS_SHARE = 0.75


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise ValueError(text)
    return float(text)


# Arguments of `add_argument`, of argparse and of pytest.
OPTIONS: dict[str, dict[str, Any]] = {
    "--only": {
        "default": "",
        "metavar": "NAME",
        "help": "the workload of this name, or all with this in their names, such as leff-tiny, training or scaling; "
        "others has models of other libraries, which no other run takes",
    },
    "--quick": {"action": "store_true", "help": "a few workloads and implementations: a minute or two"},
    "--targets": {
        "action": "store_true",
        "help": "on the CPU, hold LeFF and both models to the best that is free, inference and training, with a "
        "verdict for each: a quarter of an hour; a target that is missed fails",
    },
    "--compare": {
        "metavar": "BASE",
        "help": "time the fused modules of this checkout against those of another commit, branch or tag, in turns, "
        "live and frozen; what is slower beyond the noise fails",
    },
    "--device": {"default": "auto", "choices": ("auto", "cpu", "cuda"), "help": "auto takes a GPU if there is one"},
    "--instructions": {
        "choices": INSTRUCTIONS,
        "help": "have PyTorch, oneDNN, OpenVINO, MKL and the fused operators take no more than these; who cannot be "
        "told is left out where the processor has more",
    },
    "--seconds": {"type": _positive, "metavar": "S", "help": "to time each workload; unless given 4, with --quick 1"},
    "--minutes": {
        "type": _positive,
        "metavar": "M",
        "help": f"start nothing new after; unless given {_MINUTES:g}, or no limit with --only, --targets or --compare",
    },
    "--report": {"metavar": "DIR", "help": "write a report there: tables, pictures, times modelled for a GPU"},
}


class Session:
    """What a run measures, and the results so far. The arguments are those of `OPTIONS`.

    Attributes:
        cases: implementations to measure by workload.
        targets: to hold the results to.
        results: by workload.
        judged: results of targets.
        comparisons: with the other commit.

    Raises:
        UsageError: options that do not go together, no such workload, or no GPU.
    """

    def __init__(
        self,
        *,
        only: str = "",
        quick: bool = False,
        targets: bool = False,
        compare: str | None = None,
        device: str = "auto",
        instructions: str | None = None,
        seconds: float | None = None,
        minutes: float | None = None,
    ) -> None:
        if instructions:
            limit_instructions(instructions)
        if targets and (compare or quick):
            raise UsageError("--targets: expected without --compare and --quick")
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device: cuda was asked for, but no CUDA GPU is available to PyTorch")
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self.base, self._quick, self._seconds = compare, quick, seconds
        limited = not (only or targets or compare)
        self.clock = Clock(60 * (minutes or (_MINUTES if limited else math.inf)))
        others = only.startswith(OTHERS)
        found = targets_of_others if others else targets_of
        self.targets = found(self.device) if targets else []
        if targets and not self.targets:
            raise UsageError(f"--targets: none are set for {self.device.type}, only for the CPU (--device cpu)")
        workloads = others_plan() if others else plan(self.device, quick=quick)
        workloads = [target.workload for target in self.targets] or workloads
        if not (targets or compare or quick) and (not only or only.startswith("scaling")):
            workloads += scaling_plan(self.device)
        self.cases = {workload: self._implementations(workload) for workload in select_workloads(workloads, only)}
        self.targets = [target for target in self.targets if target.workload in self.cases]
        self.results: dict[Workload, Result] = {}
        self.judged: list[TargetResult] = []
        self.comparisons: list[Comparison] = []

    def _implementations(self, workload: Workload) -> list[str]:
        if self.base:
            return ["fused", "frozen"] if workload.served else ["fused"]
        if self.targets:
            found = (t.implementations for t in self.targets if t.workload == workload)
            return list(dict.fromkeys(name for names in found for name in names))
        if workload.axis:
            return ["plain", "fused"]
        return [name for name in IMPLEMENTATIONS if not (self._quick and name in COSTLY)]

    def measure(self, workload: Workload) -> Result | None:
        """The result of a workload, measured once; None where the run's time is used up."""
        if workload not in self.results:
            if self.clock.used(1.0 if workload.axis else _WORKLOADS_SHARE):
                return None
            seconds = self._seconds or (1.0 if self._quick else 0.5 if workload.axis else 4.0)
            self.results[workload] = measure_workload(
                workload, self.device, seconds=seconds, implementations=self.cases[workload], clock=self.clock
            )
        return self.results[workload]

    def judge(self, target: Target) -> TargetResult:
        """Hold the result of a target's workload to it."""
        self.judged.append(judge(target, self.measure(target.workload)))
        return self.judged[-1]

    def compare(self, base: Worker, head: Worker, workload: Workload, implementation: str) -> Comparison:
        """Compare the processes of two commits."""
        self.comparisons.append(compare(base, head, workload, implementation, self._seconds or 4.0))
        return self.comparisons[-1]


def select_workloads(workloads: Sequence[Workload], only: str) -> list[Workload]:
    """The one of these workloads with the name `only`, or those that have it in their name.

    Raises:
        UsageError: there is none.
    """
    chosen = [w for w in workloads if only == w.name] or [w for w in workloads if only in w.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(w.name for w in workloads))
        raise UsageError(f"--only: no workload has {only!r} in its name; there are {names}")
    return chosen
