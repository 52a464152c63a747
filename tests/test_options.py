"""Every option of every command is used by a test or an example."""

import argparse
import ast
import runpy
import sys
from pathlib import Path

import pytest

import ceit.__main__
import ceit_kernels.__main__
from ceit.demo import DemoOptions
from ceit.runtime.options import EvaluateOptions, ExportOptions, PredictOptions, TrainOptions

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tests", "examples") for path in (ROOT / folder).glob("**/*.py"))
CLASSES = {
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "predict": PredictOptions,
    "export": ExportOptions,
    "demo": DemoOptions,
}


def commands():
    for build_parser in (ceit.__main__.build_parser, ceit_kernels.__main__.build_parser):
        subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
        yield from subparsers.choices.items()


def words_of(path):
    """Texts in a file's code, and the names of keyword arguments and options in it."""
    texts, names = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword | ast.Name):
            names.add(node.arg if isinstance(node, ast.keyword) else node.id)
        elif isinstance(node, ast.Dict):
            names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts |= set(node.value.split())
    return texts, names | {text[2:].partition("=")[0].replace("-", "_") for text in texts if text.startswith("--")}


WORDS = {path: words_of(path) for path in FILES if path != Path(__file__)}


@pytest.mark.parametrize("command", [name for name, _ in commands()])
def test_every_option_is_used_where_its_command_is(command):
    parser = dict(commands())[command]
    settings = CLASSES[command].__name__ if command in CLASSES else None
    # Options of training are also made by the fixture of this name.
    makers = {settings, "options"} if command == "train" else {settings}
    used = [names for texts, names in WORDS.values() if command in texts or makers & names]
    options = {action.dest for action in parser._actions if action.option_strings and action.dest != "help"}
    assert options <= set().union(*used), "without a test or an example"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("package", ["ceit", "ceit_kernels"])
def test_a_package_is_run_as_a_command_and_imported_without_a_word(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    runpy.run_module(f"{package}.__main__", run_name="imported")
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"{package}.__main__", run_name="__main__")
    assert f"usage: python -m {package} " in capsys.readouterr().out
