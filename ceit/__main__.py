"""The command line: `python -m ceit {train,evaluate,predict,export,demo,bench,info}`."""

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.utils import world_info_from_env

import ceit_kernels

from .demo import DemoFailed, DemoOptions, demo
from .evaluate import evaluate_checkpoint
from .export import ExportFailed, export
from .predict import predict, rendered
from .runtime import checkpoints
from .runtime.errors import UsageError
from .runtime.fields import add_options
from .runtime.machine import devices, keep_freed_memory, versions
from .runtime.options import EvaluateOptions, ExportOptions, PredictOptions, TrainOptions
from .runtime.progress import TrainingFailed
from .runtime.recipes import add_recipe_options, with_recipe
from .train import train

_logger = logging.getLogger("ceit.main")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m ceit", description="Train and evaluate CeiT.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, options, help in (
        ("train", TrainOptions, "train a model on the digits or on a folder of images"),
        ("evaluate", EvaluateOptions, "accuracy of a checkpoint on test images"),
        ("predict", PredictOptions, "classes of pictures, by a checkpoint"),
        ("export", ExportOptions, "write a checkpoint's model in other formats"),
        ("demo", DemoOptions, "train on the digits with plain and with fused operators, and compare"),
    ):
        # In full, or --rec would not be taken for --recipe where the recipe is read.
        command = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=options is not TrainOptions
        )
        if options is TrainOptions:
            add_recipe_options(command)
        add_options(command, options)
        command.set_defaults(options=options)
    commands.add_parser("bench", help="time plain and fused operators and models, or this commit against another")
    commands.add_parser("info", help="what would run here, and why", description="What would run here, and why.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 if it was used wrongly, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    try:
        words = ["train", *with_recipe(arguments[1:])] if arguments[:1] == ["train"] else arguments
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given = vars(build_parser().parse_args(words))
    command, options_class = given.pop("command"), given.pop("options", None)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    # Of the processes that torchrun starts, one speaks.
    logging.getLogger("ceit").setLevel(logging.INFO if world_info_from_env()[1] == 0 else logging.WARNING)
    options = options_class(**given) if options_class else None
    try:
        _COMMANDS[command](options)
    except (UsageError, ceit_kernels.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, ExportFailed, DemoFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted{_how_to_resume(arguments, options)}", file=sys.stderr)
        return 130
    return 0


def _train(options: TrainOptions) -> None:
    keep_freed_memory()
    result = train(options)
    _logger.info(
        "test accuracy %.2f%% (best %.2f%% after epoch %d), %.0f images/s; everything is in %s",
        result.accuracy,
        result.best_accuracy,
        result.best_epoch,
        result.images_per_second,
        options.output,
    )


def _evaluate(options: EvaluateOptions) -> None:
    metrics = evaluate_checkpoint(options)
    if _logger.isEnabledFor(logging.INFO):
        print(f"top-1 {metrics.top1:.2f}%  top-5 {metrics.top5:.2f}%  loss {metrics.loss:.4f}  {metrics.images} images")


def _bench(arguments: list[str]) -> int:
    """Run the benchmarks of the checkout that this package is in."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        print("error: bench works in a checkout only, the installed packages have no benchmarks", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.__main__").main(arguments)


def _predict(options: PredictOptions) -> None:
    print(rendered(predict(options), options.format))


def _export(options: ExportOptions) -> None:
    for path in export(options):
        print(path)


def _info(_: None) -> None:
    print(ceit_kernels.status())
    print()
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print("\n".join(devices()))


def _how_to_resume(arguments: list[str], options: object) -> str:
    if not isinstance(options, TrainOptions):
        return ""
    if not (Path(options.output) / checkpoints.LAST).is_file():
        return " before the first checkpoint"
    again = arguments if options.resume else [*arguments, "--resume"]
    return f"; to go on: python -m ceit {shlex.join(again)}"


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "demo": demo,
    "info": _info,
}

if __name__ == "__main__":
    sys.exit(main())
