"""What users type: options of commands, arguments of public functions, and what each is unless given.

interface.txt has them; `PYTHONPATH=tests:. python tests/test_interface.py` writes it anew. What changes there changes
for users: it belongs into the changelog.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

from test_options import CLASSES, commands

import ceit
import ceit_kernels
from ceit.blocks import Block, LCABlock
from ceit.embed import I2TEmbed

FILE = Path(__file__).with_name("interface.txt")


def lines():
    for command, parser in commands():
        fields = {field.name: field for field in dataclasses.fields(CLASSES[command])} if command in CLASSES else {}
        for action in parser._actions:
            words = [*action.option_strings, repr(action.default), *map(str, action.choices or ())]
            words += ["required"] if action.required else []
            words += [f"nargs={action.nargs}"] if action.nargs is not None else []
            words += [action.type.__name__] if action.type else []
            if action.dest in fields:
                bounds = fields[action.dest].metadata["range"].items()
                words += [f"{relation} {bound}" for relation, bound in bounds if bound is not None]
            if action.dest != "help":
                yield " ".join([command, *([] if action.option_strings else [action.dest]), *words])
    for package in (ceit, ceit_kernels):
        for name in sorted(package.__all__):
            public = getattr(package, name)
            if callable(public) and not (isinstance(public, type) and issubclass(public, Exception)):
                yield call_of(f"{package.__name__}.{name}", public)
    for part in (Block, LCABlock, I2TEmbed):
        yield call_of(f"{part.__module__}.{part.__name__}", part)
    for kind in (ceit.CeiT, ceit_kernels.Frozen):
        for name, method in vars(kind).items():
            if callable(method) and not name.startswith("_"):
                yield call_of(f"{kind.__name__}.{name}", method)


def call_of(name, function):
    return f"{name}({', '.join(map(text_of, inspect.signature(function).parameters.values()))})"


def text_of(argument):
    default = getattr(argument.default, "__qualname__", repr(argument.default))
    name = str(argument.replace(annotation=argument.empty, default=argument.empty))
    return name if argument.default is argument.empty else f"{name}={default}"


def test_options_arguments_and_defaults_are_those_that_users_know():
    assert "\n".join(lines()) + "\n" == FILE.read_text()


def test_values_are_frozen_but_for_options_and_what_a_run_changes():
    changing = set()
    for path in (path for package in (ceit, ceit_kernels) for path in Path(package.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = map(ast.unparse, node.decorator_list) if isinstance(node, ast.ClassDef) else ()
            changing |= {node.name for found in decorators if "dataclass" in found and "frozen=True" not in found}
    assert {name for name in changing if not name.endswith("Options")} == {"Run", "_Kind", "_Prepacked"}


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
