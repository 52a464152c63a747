import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ceit import train as training
from ceit.runtime.building import build_model
from ceit.runtime.checkpoints import load_checkpoint_state, save_checkpoint
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.files import write_atomically
from ceit.runtime.progress import TrainingFailed
from ceit.runtime.steps import EagerSteps
from ceit.train import train
from ceit_kernels.operators import OPERATORS

COMPILE = torch.compile


def states_of(folder):
    state = load_checkpoint_state(Path(folder) / "last.pt")
    return {**state["model"], **{f"ema.{name}": tensor for name, tensor in state.get("model_ema", {}).items()}}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_times(history):
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in history]


def test_a_run_leaves_options_metrics_result_and_checkpoints(options, tmp_path):
    result = train(options(epochs=3, warmup_epochs=1))
    folder = tmp_path / "run"
    names = {"options.json", "metrics.jsonl", "metrics.csv", "result.json", "last.pt", "best.pt", "curves.png", ".lock"}
    assert {path.name for path in folder.iterdir()} == names
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    keys = {"epoch", "train_loss", "test_loss", "test_accuracy", "test_top5", "images_per_second", "lr", "seconds"}
    assert all(set(record) == keys for record in records)
    speeds = [record["images_per_second"] for record in records]
    assert speeds == [pytest.approx(8 * (34 // 8) / record["seconds"]) for record in records]
    assert (result.images_per_second, result.epochs, result.processes) == (sorted(speeds)[1], 3, 1)
    written = json.loads((folder / "result.json").read_text())
    assert written["accuracy"] == result.accuracy == records[-1]["test_accuracy"]
    assert written["best_accuracy"] == max(record["test_accuracy"] for record in records)
    assert len(written["step_losses"]) == 3 * (34 // 8)
    assert written["peak_memory_mb"] > 50
    assert written["fused_operators"] == {}
    assert written["versions"]["torch"] == torch.__version__
    best = load_checkpoint_state(folder / "best.pt")
    assert best["epoch"] == written["best_epoch"]
    assert best["classes"] == ["ant", "bee", "cat"]
    saved_options = json.loads((folder / "options.json").read_text())
    assert saved_options == best["options"]
    assert (saved_options["num_classes"], saved_options["hflip"]) == (3, 0.5)


def test_training_learns(options):
    losses = train(options(epochs=8, lr=3e-3, drop_path=0.0, label_smoothing=0.0, scale=[0.7, 1.0])).step_losses
    assert statistics.median(losses[-8:]) < 0.7 * statistics.median(losses[:8])


def test_the_seed_decides_the_numbers(options, tmp_path):
    runs = [train(options(output=str(tmp_path / name), seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0].step_losses == runs[1].step_losses
    assert runs[0].step_losses != runs[2].step_losses


def test_every_epoch_and_process_draws_other_numbers():
    draws = set()
    for epoch, rank in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        training._seed_epoch(3, epoch, Place(torch.device("cpu"), rank))
        draws |= {torch.rand(()).item(), float(np.random.rand()), random.random()}
    assert len(draws) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 2, "random_erasing": 0.3},
        {"ema": True, "mixup": 0.8, "cutmix": 1.0, "accumulate": 2, "clip_grad": 1.0, "amp": "bfloat16"},
    ],
    ids=["workers", "ema-mixup-amp"],
)
def test_a_killed_run_goes_on_with_exactly_the_numbers_of_an_uninterrupted_one(options, tmp_path, changes):
    whole = options(output=str(tmp_path / "whole"), **changes)
    expected = train(whole)

    killed = options(output=str(tmp_path / "killed"), resume="auto", **changes)
    updates = 2 if "accumulate" in changes else 4
    child = f"""
import os, signal
import ceit.train as training
from ceit.runtime.options import TrainOptions

update, seen = training._update, []
def kill_in_the_second_epoch(run):
    update(run)
    if run.updates == {updates} + 1:
        os.kill(os.getpid(), signal.SIGKILL)
training._update = kill_in_the_second_epoch
training.train({killed!r})
"""
    process = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert load_checkpoint_state(tmp_path / "killed" / "last.pt")["epoch"] == 1

    result = train(killed)
    assert result.step_losses == expected.step_losses
    assert result.accuracy == expected.accuracy
    assert_same_weights(states_of(killed.output), states_of(whole.output))
    histories = [load_checkpoint_state(Path(o.output) / "last.pt")["history"] for o in (killed, whole)]
    assert without_times(histories[0]) == without_times(histories[1])
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_finished_run_resumes_to_the_same_result(options):
    first = train(options())
    assert train(options(resume="auto")) == training.dataclasses.replace(
        first, peak_memory_mb=pytest.approx(first.peak_memory_mb, rel=0.5)
    )


def test_a_run_without_a_schedule_can_be_made_longer(options, tmp_path):
    constant = {"sched": "none", "lr": 1e-3}
    train(options(epochs=1, **constant))
    longer = train(options(epochs=2, resume="auto", **constant))
    at_once = train(options(epochs=2, output=str(tmp_path / "at_once"), **constant))
    assert longer.step_losses == at_once.step_losses


def test_fused_and_plain_operators_train_alike(options, tmp_path):
    plain = train(options(output=str(tmp_path / "plain")))
    fused = train(options(output=str(tmp_path / "fused"), fused=True))
    torch.testing.assert_close(torch.tensor(fused.step_losses), torch.tensor(plain.step_losses), rtol=1e-3, atol=1e-4)
    assert set(fused.fused_operators) == set(OPERATORS)
    assert all(by["backend"] in ("reference", "native") and by["reason"] for by in fused.fused_operators.values())
    assert states_of(tmp_path / "fused").keys() == states_of(tmp_path / "plain").keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bfloat16"},
        {"amp": "float16"},
        {"mixup": 0.8, "cutmix": 1.0},
        {"ema": True},
        {"grad_checkpointing": True},
        {"opt": "sgd", "sched": "step", "label_smoothing": 0.0},
        {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "drop_path": 0.2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_of_training_run(options, changes):
    result = train(options(epochs=1, **changes))
    assert len(result.step_losses) == 4
    assert 0 <= result.accuracy <= 100


def test_a_compiled_model_trains_alike(options, tmp_path, monkeypatch):
    plain = train(options(epochs=1))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or COMPILE(model, backend="eager"))
    result = train(options(epochs=1, compile=True, output=str(tmp_path / "compiled")))
    assert len(compiled) == 1
    torch.testing.assert_close(torch.tensor(result.step_losses), torch.tensor(plain.step_losses))
    assert states_of(tmp_path / "compiled").keys() == states_of(tmp_path / "run").keys()


def test_gradient_checkpointing_changes_nothing_but_memory(options, tmp_path):
    plain = train(options(epochs=1))
    recomputed = train(options(epochs=1, grad_checkpointing=True, output=str(tmp_path / "recomputed")))
    torch.testing.assert_close(torch.tensor(recomputed.step_losses), torch.tensor(plain.step_losses))


def test_averaged_weights_lag_behind_and_are_what_is_tested(options, tmp_path):
    train(options(ema=True))
    state = load_checkpoint_state(tmp_path / "run" / "last.pt")
    assert state["model_ema"].keys() == state["model"].keys()
    assert not torch.equal(state["model_ema"]["head.weight"], state["model"]["head.weight"])


def test_batches_are_accumulated_into_updates_and_the_rest_of_an_epoch_too(options, tmp_path):
    train(options(epochs=1, accumulate=3))
    state = load_checkpoint_state(tmp_path / "run" / "last.pt")
    assert (len(state["step_losses"]), state["updates"]) == (4, 2)


def prepared(settings):
    place = Place(torch.device("cpu"))
    settings = training.resolve(settings, place, None)
    settings.num_classes = 3
    return training.prepare_run(training.prepare_model(settings, place), settings, place, batches=4)


def test_gradients_are_the_mean_of_a_group_also_of_the_last_and_smaller_one(options, monkeypatch):
    """Of four equal batches, three and one to an update, both means are the gradient of a batch."""
    run = prepared(options(accumulate=3, drop_path=0.0, fused=True))
    gradients = []
    take_step = EagerSteps(run)
    monkeypatch.setattr(take_step, "_apply_gradients", lambda: gradients.append(run.model.head.weight.grad.clone()))
    batch = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    training._train_epoch(run, take_step, [batch] * 4)
    torch.testing.assert_close(gradients[1], gradients[0] + gradients[0])
    assert gradients[0].norm() > 0


def test_gradients_are_clipped_as_they_are_without_their_scale(options):
    run = prepared(options(amp="float16", clip_grad=0.5, opt="momentum", lr=1.0, sched="none"))
    parameters = [p for p in run.model.parameters() if p.ndim == 1]  # which no weight decay moves
    before = [p.detach().clone() for p in parameters]
    scale = float(run.scaler.scale(torch.ones(())))
    assert scale > 1
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    for p in parameters:
        p.grad += scale
    EagerSteps(run)._apply_gradients()
    moved = torch.cat([b - p.detach() for b, p in zip(before, parameters, strict=True)])
    assert moved.norm() == pytest.approx(0.5, rel=1e-3)


def test_the_learning_rate_warms_up_and_falls(options, tmp_path):
    """That of the head, where other layers have lower ones."""
    train(options(epochs=4, warmup_epochs=1, lr=1e-3, min_lr=1e-5, layer_decay=0.5))
    history = load_checkpoint_state(tmp_path / "run" / "last.pt")["history"]
    rates = [record["lr"] for record in history]
    assert rates[0] == pytest.approx(1e-3, rel=0.2)
    assert rates[0] > rates[1] > rates[2] > rates[3] >= 1e-5


def test_training_starts_from_given_weights_without_the_excluded(options, tmp_path):
    train(options(epochs=1))
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    settings = options(num_classes=5, checkpoint=str(tmp_path / "run" / "last.pt"), exclude=["head"])
    model = training.prepare_model(settings, Place(torch.device("cpu")))
    assert torch.equal(model.cls_token, weights["cls_token"])
    assert model.head.weight.shape == (5, 32)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint_of_it(options, tmp_path, monkeypatch):
    train(options(epochs=2, sched="none"))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", lambda self, x, y: x.sum() * float("nan"))
    with pytest.raises(TrainingFailed, match="loss of step 1 of this epoch is nan: try a lower --lr"):
        train(options(epochs=3, sched="none", resume="auto"))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "--lr must be above 0, got nan"),
        ({"clip_grad": float("inf")}, "--clip-grad must be finite, got inf"),
        ({"seed": 2**32}, "--seed must be at most 4294967295"),
        ({"label_smoothing": 1.0}, "--label-smoothing must be below 1, got 1.0"),
        ({"scale": [0.0, 1.0]}, "--scale must be above 0, got 0 1"),
        ({"amp": "int8"}, "--amp must be one of none, bfloat16, float16, got 'int8'"),
        ({"data": None}, "--data must be given"),
        ({"data": "nowhere"}, "there is no such folder"),
        ({"warmup_epochs": 2}, "--warmup-epochs must be below --epochs, 2, got 2"),
        ({"mixup": 0.1, "batch_size": 7}, "--batch-size must be even with --mixup or --cutmix, got 7"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "--min-lr must be at most --lr, 1e-06, got 1e-05"),
        ({"model": "ceit_huge"}, "--model ceit_huge: .*unknown model"),
        ({"model_kwargs": {"colour": 1}}, "--model ceit_tiny_patch16_224: .*colour"),
        ({"model_kwargs": {"in_chans": 1}}, "in_chans=1: images are read as RGB, expected 3"),
        ({"model_kwargs": {"img_size": 64}}, "give it as --img-size"),
        ({"model_kwargs": {"fused": True}}, "give it as --fused"),
        ({"model_kwargs": {"features_only": True}}, "expected a model that classifies images"),
        ({"model_kwargs": {"global_pool": ""}}, "expected a model that classifies images"),
        ({"num_classes": 2}, "--num-classes 2: expected at least 3"),
        ({"batch_size": 64}, "--batch-size 64: the training split has only 34 images"),
        ({"opt": "adamsky"}, "--opt adamsky: "),
        ({"auto_augment": "magic"}, "--auto-augment magic: "),
        ({"backend": "magic", "fused": True}, "--backend: .*'magic'"),
        ({"backend": "native"}, "--backend native is for fused operators, which --no-fused leaves out"),
        ({"backend": "triton", "fused": True}, "triton"),
        ({"device": "tpu9"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        ({"device": "meta"}, "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"sync_bn": True}, "--sync-bn needs several processes"),
        ({"checkpoint": "nowhere.pt"}, "--checkpoint: .*nowhere.pt"),
        ({"resume": "nowhere.pt"}, "--resume nowhere.pt: no such file"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used_are_named_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        train(options(**changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_named(options):
    with pytest.raises(UsageError, match="--device cuda: no CUDA GPU is available"):
        train(options(device="cuda"))


def test_classes_that_differ_between_the_splits_are_named(options, make_images, tmp_path):
    root = make_images(tmp_path / "other", {"train/a": 9, "train/b": 9, "val/a": 3, "val/c": 3})
    message = "classes of the training and the test images differ: b only in the first, c only in the second"
    with pytest.raises(UsageError, match=message):
        train(options(data=str(root)))


def test_an_output_folder_that_holds_a_run_is_left_alone(options, tmp_path):
    train(options(epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UsageError, match="already holds a run: add --resume to go on with it, or give another folder"):
        train(options(epochs=1))
    save_checkpoint(tmp_path / "other.pt", torch.load(tmp_path / "run" / "last.pt", weights_only=True))
    with pytest.raises(UsageError, match=r"already holds another run than --resume .*other\.pt"):
        train(options(epochs=1, resume=str(tmp_path / "other.pt")))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_an_output_that_is_a_file_is_named(options, tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(UsageError, match=r"--output .*run is a file, expected a folder"):
        train(options())


def test_resuming_names_every_option_that_would_change_the_numbers(options):
    train(options())
    changes = {"lr": 5e-4, "epochs": 1, "batch_size": 16, "seed": 1, "ema": True, "model_kwargs": {"depth": 3}}
    with pytest.raises(UsageError, match="cannot resume") as error:
        train(options(resume="auto", **changes))
    named = set(re.findall(r"--([a-z-]+) was", str(error.value)))
    assert named == {"lr", "epochs", "batch-size", "seed", "ema", "model-kwargs"}
    assert "--lr was 0.001, is 0.0005" in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged or no checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or no checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "is not one of `ceit train`, it lacks classes, epoch"),
        (lambda path: torch.save(dict.fromkeys(FORMAT_KEYS, 99), path), "has format 99, this version reads format 1"),
    ],
    ids=["truncated", "empty", "foreign", "newer"],
)
def test_checkpoints_that_cannot_be_resumed_from_are_named(options, tmp_path, spoil, message):
    train(options(epochs=1))
    spoil(tmp_path / "run" / "last.pt")
    with pytest.raises(UsageError, match=message):
        train(options(epochs=1, resume="auto"))


FORMAT_KEYS = ("format", "model", "optimizer", "epoch", "options", "classes", "history", "step_losses")


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, done = tmp_path / "last.pt", []

    def fsync(descriptor):
        assert os.fstat(descriptor).st_size == 4, "what was written has left the process"
        done.append("fsync")

    monkeypatch.setattr(os, "fsync", fsync)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_atomically(path, lambda file: file.write(b"half"))
    assert done == ["fsync", "replace"]
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail_halfway(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail_halfway)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_model_is_the_one_that_the_options_describe(options):
    model = build_model(options(num_classes=7), drop_path_rate=0.3)
    assert (len(model.blocks), model.head.out_features) == (2, 7)
