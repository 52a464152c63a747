"""`make bench`: measure, model, and write the report."""

from __future__ import annotations

import os

# The profiler that sums up memory otherwise speaks of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ceit.runtime.options import UsageError

from .harness.command import select_device, select_workloads
from .harness.implementations import COSTLY, IMPLEMENTATIONS, ImplementationError
from .harness.machine import environment, measure_ceilings
from .harness.measure import Clock, measure_workload
from .harness.workloads import plan
from .modelled import model_gpu
from .report import write_report
from .scaling import measure_scaling

_COMMAND = "python -m benchmarks"
SCALING = "scaling"
_MINUTES = 12.0
# Ahead of the limit of the whole run, for the pictures and for a workload that is under way.
_WORKLOADS_SHARE = 0.75


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; returns 0, or 1 if an implementation was refused, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = json.loads(Path(options.redraw).read_text()) if options.redraw else _measure(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, json.JSONDecodeError) as error:
        print(f"error: --redraw: {error}", file=sys.stderr)
        return 2
    refused = write_report(data, folder)
    print(f"the report is {folder / 'report.md'}")
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    return 1 if refused else 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    clock = Clock(60 * options.minutes)
    device = select_device(options.device)
    scaling_alone = options.only == SCALING
    workloads = [] if scaling_alone else select_workloads(plan(device, quick=options.quick), options.only)
    names = [name for name in IMPLEMENTATIONS if not (options.quick and name in COSTLY)]

    def say(what: str) -> None:
        print(f"[{clock.spent:5.0f} s of {60 * options.minutes:.0f}] {what}", flush=True)

    say("ceilings: a copy and a product")
    dtypes = list(dict.fromkeys(workload.dtype for workload in workloads)) or ["float32"]
    ceilings = [{name: measure_ceilings(device, getattr(torch, name)) for name in dtypes}]
    measured, left_out, failed = [], [], []
    for i, workload in enumerate(workloads, 1):
        if clock.used(_WORKLOADS_SHARE):
            left_out.append(workload.name)
            continue
        say(f"{workload.name} ({i} of {len(workloads)})")
        seconds = 1.0 if options.quick else 4.0
        try:
            result = measure_workload(workload, device, seconds=seconds, implementations=names, clock=clock)
        except ImplementationError as error:
            failed.append(f"{workload.name}: plain failed: {error}")
            continue
        measured.append(result.as_dict())
    scaling, refused = [], []
    if scaling_alone or not (options.quick or options.only):
        scaling = measure_scaling(device, say, clock=clock, left_out=left_out, refused=refused)
    if left_out:
        say(f"left out, the time is used up: {', '.join(left_out)}")
    # Again, for whoever shares the machine may have slowed the first.
    ceilings.append({name: measure_ceilings(device, getattr(torch, name)) for name in dtypes})
    say("modelled: kernels counted for an H100")
    modelled = model_gpu()
    say("pictures")
    return {
        "command": " ".join([_COMMAND, *_given(options)]),
        "environment": environment(device),
        "ceilings": {n: {key: max(c[n][key] for c in ceilings) for key in ceilings[0][n]} for n in dtypes},
        "measured": measured,
        "left_out": left_out,
        "failed": failed,
        "scaling": scaling,
        "scaling_refused": refused,
        "modelled": modelled,
        "seconds": clock.spent,
    }


def _given(options: argparse.Namespace) -> list[str]:
    """The options that decide over the numbers, as they were given."""
    words = ["--quick"] if options.quick else []
    named = {"--only": options.only, "--device": options.device, "--minutes": f"{options.minutes:g}"}
    default = {"--only": "", "--device": "auto", "--minutes": f"{_MINUTES:g}"}
    return words + [word for name, value in named.items() if value != default[name] for word in (name, value)]


def _minutes(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Measure the benchmarks and write a report.")
    parser.add_argument("--output", default="runs/bench", metavar="DIR", help="folder of the report (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a few workloads and implementations, no scaling: a minute"
    )
    parser.add_argument(
        "--only", default="", metavar="NAME", help=f"workloads with this in their names, or {SCALING} (all)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where (%(default)s)")
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=_MINUTES,
        help="limit of the run; what comes last is left out (%(default)s)",
    )
    parser.add_argument("--redraw", metavar="PATH", help="make the report of a stored report.json, measuring nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
