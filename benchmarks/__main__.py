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

from ceit.benchmarking.command import select_device, select_groups
from ceit.benchmarking.contenders import CONTENDERS, COSTLY, ContenderError
from ceit.benchmarking.groups import plan
from ceit.benchmarking.machine import environment, measure_ceilings
from ceit.benchmarking.measure import Clock, measure_group
from ceit.runtime.options import UsageError

from .modelled import model_gpu
from .report import write_report
from .scaling import measure_scaling

_COMMAND = "python -m benchmarks"
SCALING = "scaling"
_MINUTES = 12.0
# Ahead of the limit of the whole run, for the pictures and for a group that is under way.
_GROUPS_SHARE = 0.75


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; returns 0, or 1 if a contender was refused, 2 for a wrong option."""
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
    groups = [] if scaling_alone else select_groups(plan(device, quick=options.quick), options.only)
    names = [name for name in CONTENDERS if not (options.quick and name in COSTLY)]

    def say(what: str) -> None:
        print(f"[{clock.spent:5.0f} s of {60 * options.minutes:.0f}] {what}", flush=True)

    say("ceilings: a copy and a product")
    dtypes = list(dict.fromkeys(group.dtype for group in groups)) or ["float32"]
    ceilings = [{name: measure_ceilings(device, getattr(torch, name)) for name in dtypes}]
    measured, left_out, failed = [], [], []
    for i, group in enumerate(groups, 1):
        if clock.used(_GROUPS_SHARE):
            left_out.append(group.name)
            continue
        say(f"{group.name} ({i} of {len(groups)})")
        seconds = 1.0 if options.quick else 4.0
        try:
            result = measure_group(group, device, seconds=seconds, contenders=names, clock=clock)
        except ContenderError as error:
            failed.append(f"{group.name}: plain failed: {error}")
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
    parser.add_argument("--quick", action="store_true", help="a few groups and contenders, no scaling: a minute")
    parser.add_argument(
        "--only", default="", metavar="NAME", help=f"groups with this in their names, or {SCALING} (all)"
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
