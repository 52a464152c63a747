"""`make bench`, with an interpreter that writes down how it is called, and `ceit bench`."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from ceit import __main__ as ceit_command

ROOT = Path(__file__).parents[2]

_INTERPRETER = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *" pip "*) exit {pip_status};; esac
"""


@pytest.fixture
def make_bench(tmp_path):
    """Run `make bench` over an environment that is set up already; returns the calls of its interpreter."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")

    def run(*, pip_status):
        calls, interpreter = tmp_path / "calls", tmp_path / "venv" / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.write_text(_INTERPRETER.format(calls=calls, pip_status=pip_status))
        interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "venv" / ".ready").touch()
        command = ["make", "bench", f"VENV={tmp_path / 'venv'}", "ARGS=--quick"]
        # A make that runs the tests must not hand its options down.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return calls.read_text().splitlines(), done.stdout

    return run


def test_offline_it_measures_without_what_is_not_installed(make_bench):
    calls, said = make_bench(pip_status=1)
    assert calls[-1] == "-m benchmarks --report runs/bench --quick"
    assert "Going on without" in said


def test_it_installs_the_pinned_runtimes_of_the_extra_and_does_not_build_the_project_again(make_bench):
    calls, _ = make_bench(pip_status=0)
    assert len(calls) == 2
    options, runtimes = calls[0].split(" -c constraints.txt ")
    assert options.startswith("-m pip install")
    extra = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("bench = "))
    assert runtimes.split() == [name.strip(' "') for name in extra.split("[", 1)[1].rstrip("]").split(",")[1:]]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(runtimes.split()) <= pinned


def test_ceit_bench_runs_the_benchmarks_of_its_checkout(monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.main", lambda arguments: len(arguments))
    assert ceit_command.main(["bench", "--only", "leff", "-x"]) == 3


def test_ceit_bench_says_that_it_needs_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceit_command, "__file__", str(tmp_path / "ceit" / "__main__.py"))
    assert ceit_command.main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("error: bench works in a checkout only")
