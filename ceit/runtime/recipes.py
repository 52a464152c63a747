"""Options of training in files: the recipes that the package brings, and the user's own."""

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..registry import is_model_folder
from .errors import UsageError, usage_errors
from .fields import flag
from .options import TrainOptions

_FOLDER = Path(__file__).parents[1] / "recipes"
_FROM_WEIGHTS = ("ceit-finetune-384", "transfer")


def recipes() -> list[str]:
    """Names of the recipes that the package brings."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add --recipe and --config, which `with_recipe` replaces by the options in these files."""
    group = parser.add_argument_group("recipe", "The command line goes before --config, which goes before --recipe.")
    group.add_argument("--recipe", choices=recipes(), default=argparse.SUPPRESS, help="options that the package brings")
    group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file of options, such as options.json of another run",
    )


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Arguments of `train` with the words of --recipe and --config put before them, which they go before.

    Raises:
        UsageError: a file cannot be read, names an option that does not exist, or is for a model that was trained.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_recipe_options(parser)
    try:
        given, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    words = []
    if hasattr(given, "recipe"):
        words += _words(_FOLDER / f"{given.recipe}.yaml", "--recipe")
    if hasattr(given, "config"):
        words += _words(Path(given.config), "--config")
    words += rest
    if (
        getattr(given, "recipe", None) in _FROM_WEIGHTS
        and not _has_weights(words)
        and not {"-h", "--help"} & set(words)
    ):
        raise UsageError(f"--recipe {given.recipe} goes on from a trained model: give --checkpoint")
    return words


def _has_weights(words: Sequence[str]) -> bool:
    """Whether arguments of `train` name weights to start from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("checkpoint", "model"):
        parser.add_argument(flag(name), default="")
    given = parser.parse_known_args(list(words))[0]
    return bool(given.checkpoint) or is_model_folder(given.model)


def _words(path: Path, source: str) -> list[str]:
    """The options in a file, as a user would write them."""
    with usage_errors(f"{source} {path}"):
        try:
            contents = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {error}") from error
        if not isinstance(contents, Mapping):
            raise ValueError("expected lines such as `epochs: 300`")
    fields = {field.name: field for field in dataclasses.fields(TrainOptions)}
    words = []
    for key, value in contents.items():
        name = str(key).replace("-", "_")
        if name in _OF_RUNS:
            continue
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UsageError(f"{source} {path}: unknown option {key}{hint}")
        words += _as_words(name, value)
    return words


# What options.json of a run has beside options, and what another run does not share with it.
_OF_RUNS = {"world_size", "output", "resume"}


def _as_words(name: str, value: Any) -> list[str]:
    if value is None or value == "auto":
        return []
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, Mapping):
        return [flag(name), *(f"{key}={part}" for key, part in value.items())]
    parts = value if isinstance(value, list) else [value]
    return [flag(name), *map(str, parts)]
