"""What runs all parts of the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run

PASSES = (
    "print('..                                                       [100%]'); print('2 passed, 1 skipped in 0.01s')"
)
FAILS = "import sys; print('1 failed, 3 passed, 2 deselected in 1.00s (0:00:01)'); sys.exit(1)"
CRASHES = "import os; os.abort()"


def part(name, code, **environment):
    return run.Part(name, ("-c", code), environment)


def test_all_parts_run_and_the_last_line_counts_their_tests(capfd):
    assert run.report([part("first", FAILS), part("second", PASSES)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "5 passed, 1 failed, 1 skipped"
    assert "2 passed, 1 skipped in 0.01s" in lines, "the closing line as pytest has it"
    assert any(
        line.endswith("second | ..                                                       [100%]") for line in lines
    )


def test_a_part_that_fails_is_named_with_the_command_that_runs_it_alone(capfd):
    assert run.report([part("good", PASSES), part("bad", FAILS, TRITON_INTERPRET="1")]) == 1
    text = capfd.readouterr().out
    again = text[text.index("1 of 2 parts failed. To run one again alone:") :]
    assert "good" not in again
    command = next(line.strip() for line in again.splitlines() if "TRITON_INTERPRET=1 " in line)
    assert subprocess.run(command, shell=True, cwd=run.ROOT, capture_output=True, check=False).returncode == 1


def test_a_part_that_ends_without_a_count_has_failed(capfd):
    assert run.report([part("crash", CRASHES)]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_where_all_is_well_the_status_is_zero_and_nothing_is_called_failed(capfd):
    assert run.report([part("good", PASSES)] * 2) == 0
    text = capfd.readouterr().out
    assert "FAILED" not in text
    assert text.splitlines()[-1] == "4 passed, 0 failed, 2 skipped"


def test_every_test_is_in_a_part_and_every_path_is_there():
    paths = {}
    for given in run.parts_of_make_test():
        words = [word for word in given.arguments if word.removeprefix("--ignore=").startswith("tests")]
        paths[given.name] = words
        assert all((run.ROOT / word.removeprefix("--ignore=")).exists() for word in words)
    for kind in ("native", "interpreter"):
        (rest,) = (words for name, words in paths.items() if name == f"{kind}, the rest")
        others = {word for name, words in paths.items() if name.startswith(kind) for word in words}
        left_out = {word.removeprefix("--ignore=") for word in rest if word.startswith("--ignore=")}
        assert left_out <= others
        assert rest[0] == {"native": "tests", "interpreter": "tests/ceit_kernels"}[kind]


def test_kinds_of_code_below_the_best_run_with_pytorch_restricted_likewise(monkeypatch, capsys):
    monkeypatch.setattr("ceit_kernels.common.extension.cpu_code", lambda: "avx2")
    (lesser,) = run.parts_by_kind()
    assert lesser.environment == {
        "CEIT_KERNELS_CPU": "baseline", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"
    }  # fmt: skip
    assert "Not run, as this processor lacks the instructions: avx512, avx512bf16." in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_that_was_started(tmp_path, number):
    code = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"path = pathlib.Path({str(tmp_path)!r}, 'child')\n"
        "path.with_suffix('.new').write_text(str(child.pid)); path.with_suffix('.new').rename(path)\n"
        "time.sleep(600)"
    )
    program = f"import sys, run; sys.exit(run.report([run.Part('waits', ('-c', {code!r}))]))"
    tests = str(Path(run.__file__).parent)
    runner = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": tests},
        # What a shell starts in the background ignores interrupts, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "child").exists():
        assert runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(number)
    assert runner.wait(timeout=100) != 0
    child = int((tmp_path / "child").read_text())
    assert any(_has_ended(child) or time.sleep(0.05) for _ in range(2000))


def _has_ended(pid):
    """Also as a zombie, which is there until its parent looks."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_unknown_name_is_refused(capsys):
    assert run.main(["fast"]) == 2
    assert "usage: python tests/run.py [test|lint|kinds|ttsem]" in capsys.readouterr().err
