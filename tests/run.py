"""Runs the parts of the tests, as many at a time as there are cores, and says at the end how to run again what failed.

`python tests/run.py` is `make test`, `python tests/run.py lint` is `make lint`. `python tests/run.py kinds` runs the
operators' native tests with each kind of compiled code that this processor has beside its best, `python tests/run.py
ttsem` all tests of kernels under ttsem.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-q", "-m", "not prove")
TTSEM = ("-m", "ttsem.sanitize", *PYTEST[1:])
KERNELS = "tests/ceit_kernels"
# The code that CEIT_KERNELS_CPU names, with the name of the same for PyTorch and for oneDNN, least first.
KINDS = {
    "baseline": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16"),
}

_PROGRESS = re.compile(r"[.FEsxX]+ *\[ *\d+%\]")
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
_CLOSING = re.compile(r"(?:=* ?)(?:\d+ \w+(?:, )?)+ in [\d.]+s.*")
_SECONDS_TO_END = 5


@dataclass(frozen=True)
class Part:
    """A process that runs a part of the tests.

    Attributes:
        name: for the user.
        arguments: of the program.
        environment: what it has beside this process's variables.
        program: an interpreter, or a tool beside it.
    """

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    program: str = sys.executable

    @property
    def command(self) -> str:
        """What a user types in the root of the project to run it alone."""
        inside = self.program.startswith(f"{ROOT}{os.sep}")
        program = os.path.relpath(self.program, ROOT) if inside else self.program
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join([program, *self.arguments])])


@dataclass(frozen=True)
class Result:
    """How a part ended."""

    part: Part
    status: int
    closing: str
    seconds: float

    def count(self, outcome: str) -> int:
        """Tests with an outcome; a part that failed without a count is one that failed."""
        found = sum(int(number) for number, name in _COUNT.findall(self.closing) if name.startswith(outcome))
        if outcome == "failed":
            found += self.count("error")
            return found or int(self.status != 0)
        return found


def parts_of_make_test() -> list[Part]:
    """What `make test` runs, the longest first."""
    leff, without_leff = f"{KERNELS}/leff", f"--ignore={KERNELS}/leff"
    interpret = {"TRITON_INTERPRET": "1"}
    tests = [
        Part("native, operators", (*PYTEST, KERNELS)),
        Part("native, the rest", (*PYTEST, "tests", f"--ignore={KERNELS}")),
        Part("interpreter, LeFF", (*PYTEST, leff), interpret),
        Part("interpreter, the rest", (*PYTEST, KERNELS, without_leff), interpret),
        # What the interpreter cannot; `make prove` runs all.
        Part("ttsem", (*TTSEM, KERNELS, "tests/benchmarks", "-k", "(agrees_with_plain and bfloat16) or make_gpu")),
    ]
    return parts_of_make_lint() + tests


def parts_under_ttsem() -> list[Part]:
    """All tests of kernels by the compiler's IR, which takes minutes where the interpreter takes seconds."""
    leff = f"{KERNELS}/leff"
    return [
        Part("ttsem, LeFF", (*TTSEM, leff)),
        Part("ttsem, the rest", (*TTSEM, KERNELS, "tests/benchmarks", f"--ignore={leff}")),
    ]


def parts_of_make_lint() -> list[Part]:
    """What `make lint` runs: style and formatting of Python and C++, imports between packages, types."""
    found = (ROOT.glob(f"{folder}/**/*.{kind}") for folder in ("csrc", "tests/simt") for kind in ("h", "cpp", "cu"))
    cpp = sorted(str(path.relative_to(ROOT)) for paths in found for path in paths)
    tools = Path(sys.executable).parent
    return [
        Part("types", ("tests/typecheck.py",)),
        Part("ruff", ("-m", "ruff", "check", ".")),
        Part("ruff format", ("-m", "ruff", "format", "--check", ".")),
        Part("clang-format", ("--dry-run", "-Werror", *cpp), program=str(tools / "clang-format")),
        Part("imports", ("--no-logo",), program=str(tools / "lint-imports")),
    ]


def parts_by_kind() -> list[Part]:
    """The operators' native tests with each kind of code below this processor's best, PyTorch restricted likewise."""
    sys.path.insert(0, str(ROOT))
    from ceit_kernels.common.extension import cpu_code

    kinds = list(KINDS)
    best = cpu_code()
    if best is None:
        sys.exit("The compiled extension is not there: there is no code to choose from.")
    lesser = kinds[: kinds.index(best)]
    absent = kinds[kinds.index(best) + 1 :]
    print(f"`make test` ran the {best} code; now: {', '.join(lesser) or 'none, there is no lesser kind'}.")
    if absent:
        print(f"Not run, as this processor lacks the instructions: {', '.join(absent)}.")
    # What is compiled for GPUs, also where it runs on the host, and what chooses backends: the same with every kind.
    same = ("machine_code", "schedules", "i2t/test_kernels", "i2t/test_registration", "warm_up", "test_backends")
    arguments = (*PYTEST, KERNELS, *(f"--ignore-glob={KERNELS}/*{name}.py" for name in same))
    return [Part(f"native, {kind}", arguments, restricted_to(kind)) for kind in lesser]


def restricted_to(kind: str) -> dict[str, str]:
    """The environment in which this project, PyTorch and oneDNN run a kind of code at most."""
    pytorch, onednn = KINDS[kind]
    return {"CEIT_KERNELS_CPU": kind, "ATEN_CPU_CAPABILITY": pytorch, "ONEDNN_MAX_CPU_ISA": onednn}


class Runner:
    """Runs parts side by side, in process groups of their own so that all that they start ends with them."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, parts: Sequence[Part]) -> list[Result]:
        """The results of all parts, in their order; ends what runs if interrupted."""
        with ThreadPoolExecutor(self._cores) as pool:
            try:
                return list(pool.map(self._run_one, parts))
            except BaseException:
                self._stop()
                raise

    def _run_one(self, part: Part) -> Result:
        start = time.monotonic()
        # A thread each, as the parts share the cores; where a test asks for more, they sleep while they wait.
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | os.environ | part.environment
        with self._lock:
            if self._stopped:
                return Result(part, 130, "", 0.0)
            self._say(part, "starts")
            process = subprocess.Popen(
                [part.program, *part.arguments], cwd=ROOT, env=environment, start_new_session=True, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
            )  # fmt: skip
            self._processes.add(process)
        lines = list(self._progress_printed(part, process.stdout))
        status = process.wait()
        closing = next((line for line in reversed(lines) if _CLOSING.fullmatch(line)), "")
        result = Result(part, status, closing.strip("= "), time.monotonic() - start)
        with self._lock:
            self._processes.discard(process)
            if not self._stopped:
                print("\n".join([f"--- {part.name}: ended with status {status}", *lines]), flush=True)
        return result

    def _progress_printed(self, part: Part, output: Iterable[str]) -> Iterable[str]:
        """The lines of an output, less those of progress, which are printed at once."""
        for line in map(str.rstrip, output):
            if _PROGRESS.fullmatch(line):
                self._say(part, line)
            else:
                yield line

    @staticmethod
    def _say(part: Part, line: str) -> None:
        print(f"{part.name:>25} | {line}", flush=True)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        end = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        for process in processes:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process.pid, number)


def summary(results: Sequence[Result]) -> str:
    """A line for each part, what failed and how to run that again, and the totals."""
    lines = [
        f"{r.part.name:>25} | {'FAILED' if r.status else 'ok':6} | {r.seconds:4.0f} s | {r.closing or '-'}"
        for r in results
    ]
    failed = [r.part for r in results if r.status]
    if failed:
        lines += ["", f"{len(failed)} of {len(results)} parts failed. To run one again alone:"]
        lines += [line for part in failed for line in (f"  {part.name}:", f"    {part.command}")]
    total = ", ".join(f"{sum(r.count(name) for r in results)} {name}" for name in ("passed", "failed", "skipped"))
    return "\n".join(["", *lines, "", total])


def report(parts: Sequence[Part]) -> int:
    """Run parts, print what they say and the summary; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        results = Runner().run(parts)
    except KeyboardInterrupt:
        print("Interrupted: everything that ran was ended.", flush=True)
        return 130
    print(summary(results), flush=True)
    return int(any(r.status for r in results))


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments name; returns the exit status."""
    choices = {
        "test": parts_of_make_test,
        "lint": parts_of_make_lint,
        "kinds": parts_by_kind,
        "ttsem": parts_under_ttsem,
    }
    name = arguments[0] if arguments else "test"
    if name not in choices or len(arguments) > 1:
        print(f"usage: python tests/run.py [{'|'.join(choices)}]", file=sys.stderr)
        return 2
    return report(choices[name]())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
