"""`python -m benchmarks`, which `make bench` and `python -m ceit bench` run: `pytest benchmarks --benchmark-only`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from .report import write_report
from .results import Report
from .session import OPTIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pytest and return its exit status: 0, 1 if a test failed, 2 or 4 for a wrong option."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time operators and models, plain and fused, by turns; each is checked before it is timed.",
        epilog="All other options are pytest's, such as -k, -x and --benchmark-json PATH.",
        allow_abbrev=False,
    )
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_argument("--redraw", metavar="PATH", help="make the report of a stored report.json, measuring nothing")
    options, _ = parser.parse_known_args(arguments)
    if options.redraw is None:
        return pytest.main(
            [str(Path(__file__).parent), "--benchmark-only", "--benchmark-quiet", "--disable-warnings", *arguments]
        )
    try:
        report = Report.load(Path(options.redraw))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--redraw: {error!r}")
    write_report(report, Path(options.report or "runs/bench"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
