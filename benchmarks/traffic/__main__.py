"""The command line: ``python -m benchmarks.traffic``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .cases import Case, make_cases
from .compiled import STORED, STORED_FOR, STORED_WITH, CompiledTrafficError
from .modelled import BYTES_PER_SECOND, FLOPS_PER_SECOND, LAUNCH_SECONDS
from .tables import Figures, compiled_figures, format_table, times_table, traffic_table

_DTYPES = ("bfloat16", "float16", "float32")
_MODEL = (
    f"Modelled for an H100, not measured: each kernel its bytes at {BYTES_PER_SECOND / 1e12:.1f} TB/s or its products "
    f"at {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s, whichever takes longer, and {1e6 * LAUNCH_SECONDS:.0f} us a launch."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table that was asked for; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    if options.times and dtype.itemsize != 2:
        parser.error(f"--times: expected --dtype bfloat16 or float16, got {options.dtype}")
    sizes = options.batch, options.channels, options.image_size, dtype
    try:
        cases = make_cases(*sizes)
        if options.times:
            table, source = times_table(options.image_size, dtype, compiled=options.compiled), _MODEL
        else:
            figures, source = _figures(cases, options.compiled, STORED if sizes == STORED_FOR else {})
            table = traffic_table(cases, figures)
    except ValueError as error:
        parser.error(str(error))
    except CompiledTrafficError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(table, markdown=options.markdown), source, sep="\n\n")
    return 0


def _figures(cases: Sequence[Case], count: bool, stored: Figures) -> tuple[Figures, str]:
    """Figures of ``torch.compile`` and where they come from."""
    if count:
        try:
            return compiled_figures(cases), f"torch.compile: counted with torch {torch.__version__}"
        except CompiledTrafficError as error:
            print(f"{error}; the stored figures take their place", file=sys.stderr)
    return stored, f"torch.compile: stored figures, counted with torch {STORED_WITH}, at the default sizes alone"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description="Count the launches and the bytes of device memory of a call of each fused operator, beside those "
        "of torch.compile. Nothing runs and no GPU is needed. u is one pass over the tokens: batch * tokens * channels "
        "elements, where lca has 12 tokens.",
    )
    parser.add_argument("--batch", type=int, default=256, help="images (%(default)s)")
    parser.add_argument("--channels", type=int, default=384, help="of a token, a multiple of 64 (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels, a multiple of 16 (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of tokens and weights (%(default)s)")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="count the kernels of torch.compile now, with the PyTorch that is installed, in place of the figures "
        f"stored from torch {STORED_WITH}",
    )
    parser.add_argument(
        "--times",
        action="store_true",
        help="in place of the traffic, the time that LeFF would take on an H100 in CeiT-T, S and B at batch 1, 64 and "
        "256: modelled from bytes, flops and launches, not measured; with --compiled beside that of torch.compile",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
