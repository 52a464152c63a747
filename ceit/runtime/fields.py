"""Fields of dataclasses that are also options of the command line, and the check of what they may be."""

import argparse
import copy
import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

from timm.utils import ParseKwargs

from .errors import UsageError

_RELATIONS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt, "at most": operator.le}


class _KeyValues(ParseKwargs):
    """timm's `key=value` parser, with an error of its own where a `=` is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: expected key=value, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def option(
    default: Any,
    help: str,
    *,
    group: str,
    at_least=None,
    above=None,
    below=None,
    at_most=None,
    key_values=False,
    positional=False,
    **argparse_kwargs,
) -> Any:
    """A dataclass field that also describes its command line option and the range of its values.

    Args:
        default: the field's default, copied for every instance. A number gives the option its type, a bool makes it
            --name and --no-name.
        help: what it means, for --help, which adds the default.
        group: heading in --help.
        at_least: smallest number allowed.
        above: number below all that are allowed.
        below: number above all that are allowed.
        at_most: largest number allowed.
        key_values: whether it is given as key=value words.
        positional: whether it is given without its name.
        **argparse_kwargs: for `argparse.ArgumentParser.add_argument`.
    """
    if key_values:
        argparse_kwargs |= {"nargs": "*", "action": _KeyValues, "metavar": "KEY=VALUE"}
    elif isinstance(default, bool):
        argparse_kwargs["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, int | float):
        argparse_kwargs["type"] = type(default)
    metadata = {
        "help": help,
        "group": group,
        "range": {"at least": at_least, "above": above, "below": below, "at most": at_most},
        "positional": positional,
        "argparse": argparse_kwargs,
    }
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add an option to `parser` for every field of the dataclass `options`, in its groups, with its default."""
    groups = {}
    for field in dataclasses.fields(options):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = field.default_factory()
        positional = field.metadata["positional"]
        name, kwargs = (field.name, {}) if positional else (flag(field.name), {"default": default})
        action = groups[group].add_argument(name, help="", **kwargs, **field.metadata["argparse"])
        shown = "" if default is None or default in ({}, []) else f" (default: {_text(default)})"
        action.help = (field.metadata["help"] + shown).replace("%", "%%")


def check(options: Any) -> None:
    """Check that every option of a dataclass lies in its range.

    Raises:
        UsageError: naming the option, what was given and what is expected.
    """
    for field in dataclasses.fields(options):
        value, kwargs = getattr(options, field.name), field.metadata["argparse"]
        if value is None:
            if kwargs.get("required"):
                raise UsageError(f"{flag(field.name)} must be given")
            continue
        choices = kwargs.get("choices")
        for part in value if isinstance(value, list | tuple) else [value]:
            if choices and part not in choices:
                raise UsageError(f"{flag(field.name)} must be one of {', '.join(choices)}, got {part!r}")
            for relation, bound in field.metadata["range"].items():
                if bound is not None and not _RELATIONS[relation](part, bound):
                    raise UsageError(f"{flag(field.name)} must be {relation} {bound}, got {_text(value)}")
            if isinstance(part, float) and not math.isfinite(part):
                raise UsageError(f"{flag(field.name)} must be finite, got {_text(value)}")


def plain(options: Any) -> dict[str, Any]:
    """The options as JSON has them: strings, numbers, lists and dicts."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def flag(name: str) -> str:
    """The command line's spelling of a field's name."""
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    """A value as a user writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in value)
    return str(value)
