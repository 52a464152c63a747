"""The command line: ``python -m ceit_kernels try MODEL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .explain import explain
from .fuse import fuse, unfuse
from .trial import TrialError, check, image_size_of, make_model, measure


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m ceit_kernels", description="Fused operators for other models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    trial = commands.add_parser(
        "try",
        help="what fusing a model changes",
        description="Fuse a model with random weights, check outputs and gradients against plain PyTorch, and time it.",
    )
    trial.add_argument(
        "model",
        metavar="MODEL",
        help="a name of timm; hf:TYPE (hf:segformer) or hf:FOLDER with a config.json for transformers; or "
        "MODULE:FUNCTION, a function of yours that returns a model of images",
    )
    trial.add_argument("--batch", type=int, default=1, metavar="N", help="images in a call (default: %(default)s)")
    trial.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    trial.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    trial.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="timed calls of each (default: %(default)s)"
    )
    trial.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes to compile"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 if a check failed, or 2 if it was used wrongly."""
    options = build_parser().parse_args(arguments)
    try:
        for name in ("batch", "size", "repeats"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise TrialError(f"--{name}: expected at least 1, got {getattr(options, name)}")
        try:
            device = torch.device(options.device)
            model = make_model(options.model).to(device)
        except RuntimeError as error:
            raise TrialError(f"--device: {options.device!r} cannot be used: {error}") from error
        size = options.size or image_size_of(model)
        x = torch.randn(options.batch, 3, size, size, device=device)
        print(explain(fuse(model)), end="\n\n")
        checks = check(unfuse(model), x)
    except TrialError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[tuple[str, ...]] = [("compared with plain PyTorch", "difference", "allowed", "")]
    rows += [(c.name, f"{c.difference:.1e}", f"{c.allowed:.1e}", "ok" if c.passed else "WRONG") for c in checks]
    print(_table(rows), end="\n\n")
    rows = [("float32", "inference", "memory", "training step", "memory", "difference")]
    for r in measure(model, x, options.repeats, not options.no_compile):
        trained = ("-", "-") if r.training_ms is None else (f"{r.training_ms:.1f} ms", _megabytes(r.training_bytes))
        rows.append(
            (r.name, f"{r.inference_ms:.1f} ms", _megabytes(r.inference_bytes), *trained, f"{r.difference:.1e}")
        )
    print(_table(rows))
    return int(not all(each.passed for each in checks))


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
