"""What jobs ask of the machine and say of what they found."""

import contextlib
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ceit import checkpoint, data
from ceit.runtime import machine
from ceit.runtime.building import restore_model
from ceit.runtime.distributed import _check_device
from ceit.runtime.errors import UsageError
from ceit.runtime.options import PredictOptions, TrainOptions
from ceit.runtime.progress import EpochProgress, TrainingFailed, progress_bar
from ceit.runtime.setup import check_together


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"number {i}")


@pytest.mark.parametrize(
    ("device", "environment", "missing"),
    [
        ("cuda", {}, None),
        ("cuda:1", {}, None),
        ("cuda:2", {}, 2),
        ("cuda", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        ("cuda", {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}, 2),
        ("cuda", {"LOCAL_RANK": "2"}, None),
    ],
)
def test_each_process_needs_a_gpu_of_its_own(two_gpus, monkeypatch, device, environment, missing):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if missing is None:
        _check_device(device)
    else:
        with pytest.raises(UsageError, match=f"--device {device}: there are 2 GPUs, number {missing} is missing"):
            _check_device(device)


def test_devices_are_the_cpu_and_every_gpu(two_gpus):
    cpu, *gpus = machine.devices()
    assert cpu.startswith("cpu ")
    assert cpu.endswith(f", {torch.get_num_threads()} threads")
    assert gpus == ["cuda:0 number 0", "cuda:1 number 1"]


def test_memory_is_in_megabytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    assert machine.peak_memory_mb(torch.device("cuda", 0)) == 3
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: resource.struct_rusage([0.0, 0.0, 2_000_000, *[0] * 13]))
    for system, megabytes in (("linux", 2048), ("darwin", 2)):
        monkeypatch.setattr("sys.platform", system)
        assert machine.peak_memory_mb(torch.device("cpu")) == megabytes


@pytest.mark.parametrize(("listed", "most"), [(data._listed, 5), (checkpoint._listed, 8)])
def test_long_lists_are_cut_short_by_a_count(listed, most):
    names = [f"n{i}" for i in range(most + 2)]
    assert listed(names[:most]) == ", ".join(names[:most])
    assert listed(names[: most + 1]) == ", ".join(names[:most]) + " and 1 more"
    assert listed(names) == ", ".join(names[:most]) + " and 2 more"


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.1), (False, 5.0)])
def test_progress_is_shown_often_on_a_terminal_and_rarely_in_a_file(monkeypatch, terminal, seconds):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with progress_bar(10, "testing", True) as bar, progress_bar(10, "testing", False) as hidden:
        assert (bar.total, bar.mininterval, bar.leave, bar.disable) == (10, seconds, False, False)
        assert hidden.disable


def test_an_epochs_losses_are_read_ten_at_a_time_with_the_accuracy_so_far():
    shown, images = [], []
    progress = EpochProgress(SimpleNamespace(update=images.append, set_postfix_str=shown.append))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    for step in range(10):
        assert progress.losses == []
        progress.add(torch.tensor(step / 8), logits, torch.tensor([0, 1, 1, 1]))
    assert progress.losses == [step / 8 for step in range(10)]
    assert images == [4] * 10
    assert shown == ["loss 1.125, accuracy 50.0%"]
    progress.read()
    progress.add(torch.tensor(0.5), logits, torch.tensor([0, 1, 0, 0]))
    progress.read()
    assert shown[1:] == ["loss 0.500, accuracy 54.5%"]
    progress.add(torch.tensor(torch.inf), logits, torch.tensor([0, 1, 0, 0]))
    with pytest.raises(TrainingFailed, match="the loss of step 12 of this epoch is inf: try a lower --lr"):
        progress.read()


def test_compiling_shows_how_far_it_is(monkeypatch):
    shown, asked = [], []

    class Bar(contextlib.nullcontext):
        n = total = 0

        def __enter__(self):
            return self

        def update(self, count):
            self.n += count
            shown.append((self.n, self.total))

        def reset(self):
            self.n = 0

    def warm_up(model, shape, training, progress):
        asked.append((model, shape, training))
        for done in (0, 3, 4):
            progress(done, 4)

    monkeypatch.setattr(machine, "tqdm", lambda **options: Bar())
    monkeypatch.setattr(machine.ceit_kernels, "warm_up", warm_up)
    machine.compile_kernels("model", (2, 3), "none", True)
    assert asked == [("model", (2, 3), True), ("model", (2, 3), False)]
    assert shown == [(0, 4), (3, 4), (4, 4)] * 2


def test_a_folder_as_a_model_brings_its_own_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for changes in ({"checkpoint": "other.pt"}, {"ema": True}):
        with pytest.raises(UsageError, match="--checkpoint and --ema: a folder as --model brings its own weights"):
            restore_model(PredictOptions(model=str(tmp_path), **changes))
    with pytest.raises(UsageError, match="--checkpoint: a folder as --model brings its own weights"):
        check_together(TrainOptions(data="digits", model=str(tmp_path), checkpoint="other.pt"))
    with pytest.raises(UsageError, match="--checkpoint must be given, unless --model is a folder"):
        restore_model(PredictOptions())


@pytest.mark.skipif(not sys.platform.startswith("linux") or not platform.libc_ver()[0], reason="for glibc")
def test_a_training_keeps_freed_memory_unless_glibc_was_told_otherwise():
    code = """
import resource
import torch
from ceit.runtime.machine import keep_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    others = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    kept, told = (
        int(subprocess.run([sys.executable, "-c", code], env=others | given, check=True, stdout=-1).stdout)
        for given in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"})
    )
    assert 4 * kept < told  # aligned memory is not always where the last was
