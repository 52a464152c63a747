"""Runs that share a folder, die, or find no place to write: one line, and what was there stays."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ceit.__main__ import main
from ceit.runtime.checkpoints import load_checkpoint_state
from ceit.runtime.errors import UsageError
from ceit.runtime.files import claimed, write_atomically
from ceit.train import train

_HOLD = """
import sys, time
from pathlib import Path
from ceit.runtime.files import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that uses the output folder."""
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()


def child_environment():
    return {**os.environ, "PYTHONPATH": os.getcwd()}


def test_a_second_run_into_a_folder_is_refused_with_a_sentence(options, arguments_of, holder, tmp_path, capsys):
    assert main(arguments_of(options())) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --output {tmp_path / 'run'} is in use by another run: give another folder"
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_killed_run_leaves_no_lock(options, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert train(options()).epochs == 2


def test_a_lock_is_not_inherited_by_the_workers_that_load_images(tmp_path):
    with claimed(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            time.sleep(600)
    try:
        with claimed(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_another_run_has_used_in_the_meantime_is_left_alone(options, monkeypatch):
    from ceit import train as training

    prepare = training.prepare_run

    def meanwhile(*arguments):
        Path(options().output).mkdir()
        (Path(options().output) / "options.json").write_text("another's")
        return prepare(*arguments)

    monkeypatch.setattr(training, "prepare_run", meanwhile)
    with pytest.raises(UsageError, match="already holds a run"):
        train(options())
    assert (Path(options().output) / "options.json").read_text() == "another's"


_KILLED = """
import os, signal, sys
from ceit.__main__ import main

replace, left = os.replace, int(sys.argv.pop(1))
def replace_or_die(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = replace_or_die
sys.exit(main(sys.argv[1:]))
"""


# A run that is left alone tells how long one takes on this machine; the others die after a twentieth of that, about.
_KILLED_AT_RANDOM = """
import os, random, signal, sys, time
from ceit.__main__ import main

def started(output):
    child = os.fork()
    if not child:
        os._exit(main([*sys.argv[3:], "--output", output]))
    return child

draw, begun = random.Random(0), time.monotonic()
assert os.waitpid(started(sys.argv[1]), 0)[1] == 0
seconds = time.monotonic() - begun
for _ in range(20):
    child = started(sys.argv[2])
    time.sleep(draw.uniform(0.02, 0.08) * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
assert os.waitpid(started(sys.argv[2]), 0)[1] == 0
"""


@pytest.mark.prove
def test_a_run_killed_at_twenty_moments_ends_with_the_same_bits(options, arguments_of, tmp_path):
    whole, killed, epochs = str(tmp_path / "whole"), str(tmp_path / "killed"), 36
    arguments = arguments_of(options(output=whole, epochs=epochs, ema=True, resume="auto"))
    command = [sys.executable, "-c", _KILLED_AT_RANDOM, whole, killed, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    assert process.returncode == 0, process.stderr
    ends = {int(epoch) for epoch in re.findall(r"going on after epoch (\d+) of", process.stderr)} - {epochs}
    assert len(ends) >= 3, "killed on its way, several times"
    states = [load_checkpoint_state(Path(output) / "last.pt") for output in (killed, whole)]
    assert torch.equal(states[0]["step_losses"], states[1]["step_losses"])
    for kind in ("model", "model_ema"):
        assert all(torch.equal(tensor, states[1][kind][name]) for name, tensor in states[0][kind].items())


@pytest.mark.parametrize("files", [6, *(pytest.param(files, marks=pytest.mark.prove) for files in (1, 3, 7))])
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bits(options, arguments_of, tmp_path, files):
    whole, killed = options(output=str(tmp_path / "whole")), options(output=str(tmp_path / "killed"))
    expected = train(whole)
    command = [sys.executable, "-c", _KILLED, str(files), *arguments_of(killed)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list((tmp_path / "killed").glob(".*.partial"))
    result = train(options(output=killed.output, resume="auto"))
    assert result.step_losses == expected.step_losses
    states = [
        load_checkpoint_state(Path(run.output) / name) for run in (whole, killed) for name in ("last.pt", "best.pt")
    ]
    for first, second in (states[::2], states[1::2]):
        assert first["epoch"] == second["epoch"]
        assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    assert not list((tmp_path / "killed").glob(".*.partial"))


def test_what_killed_runs_left_half_written_is_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".last.pt.1-aa.partial").write_text("half")
    (tmp_path / "run" / ".hub.2.partial").mkdir()
    (tmp_path / "run" / "last.pt").write_text("whole")
    with claimed(tmp_path / "run"):
        pass
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "last.pt"]


def test_folders_are_made_with_those_that_they_are_in(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "runs" / "of today" / "first") as folder:
            assert folder.is_dir()


def test_two_writers_of_a_file_do_not_share_a_half_written_one(tmp_path):
    names = []

    def write(file):
        names.append(file.name)
        if len(names) == 1:
            write_atomically(tmp_path / "a", write)
        file.write(b"whole")

    write_atomically(tmp_path / "a", write)
    assert len(set(names)) == 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(options, arguments_of, tmp_path):
    train(options(epochs=1, sched="none"))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    child = (
        "import resource, sys; from ceit.__main__ import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); sys.exit(main(sys.argv[1:]))"
    )
    words = arguments_of(options(epochs=2, sched="none", resume="auto"))
    process = subprocess.run(
        [sys.executable, "-c", child, *words], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.splitlines()[-1].startswith(f"error: cannot write to {tmp_path / 'run'}: ")
    assert "Traceback" not in process.stderr
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("output", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_to_is_one_line(options, arguments_of, output, capsys):
    assert main(arguments_of(options(output=output))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: --output {output}: ")


def test_a_last_checkpoint_that_is_a_folder_is_one_line(options, tmp_path):
    train(options(epochs=1))
    before = (tmp_path / "run" / "best.pt").read_bytes()
    (tmp_path / "run" / "last.pt").unlink()
    (tmp_path / "run" / "last.pt").mkdir()
    for resume in (None, "auto"):
        with pytest.raises(UsageError, match=r"run: last\.pt in it is a folder, expected a checkpoint"):
            train(options(epochs=1, resume=resume))
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_a_checkpoint_truncated_at_any_byte_is_one_line(options, tmp_path):
    train(options(epochs=1))
    path = tmp_path / "run" / "last.pt"
    whole = path.read_bytes()
    draw = random.Random(0)
    lengths = [0, 1, 3, 4, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="damaged or no checkpoint") as error:
            load_checkpoint_state(path)
        assert "\n" not in str(error.value)


def test_pipes_and_devices_are_refused(options, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for changes in ({"checkpoint": str(path)}, {"resume": str(path)}):
            with pytest.raises(UsageError, match="it is a pipe or a device, expected a file"):
                train(options(**changes))


def test_states_of_other_kinds_are_named(options, tmp_path):
    train(options(epochs=1))
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "history": 3, "epoch": "one"}, path)
    with pytest.raises(UsageError, match="not one of `ceit train`, it lacks epoch, history"):
        train(options(epochs=1, resume="auto"))
    torch.save({**state, "model": {"head.weight": torch.zeros(1)}}, path)
    with pytest.raises(UsageError, match="--resume: the checkpoint is damaged: "):
        train(options(epochs=1, resume="auto"))


def test_the_weights_of_another_project_are_not_resumed_from_and_it_is_said_how_to_start(options, tmp_path):
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "official.pth")
    with pytest.raises(UsageError, match=r"to start a run from its weights, give --checkpoint .* without --resume"):
        train(options(resume=str(tmp_path / "official.pth")))
