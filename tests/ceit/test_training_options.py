"""Options of training that change its numbers: each does what it says, and those that do not fit are refused."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from ceit.data import create_train_loader, open_split, resolve_data_options
from ceit.evaluate import evaluate_checkpoint
from ceit.runtime.checkpoints import check_same_options, load_checkpoint_state, save_checkpoint
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.fields import check
from ceit.runtime.options import EvaluateOptions, TrainOptions
from ceit.runtime.setup import check_together, prepare_model, prepare_run, resolve
from ceit.train import train

CPU = Place(torch.device("cpu"))
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def run_of(settings, place=CPU, batches=10):
    settings = resolve(settings, place, None)
    settings.num_classes = settings.num_classes or 3
    return prepare_run(prepare_model(settings, place), settings, place, batches)


@pytest.mark.parametrize(
    ("changes", "lr", "min_lr"),
    [
        ({}, 1e-3, 1e-5),
        ({"lr": 1e-5}, 1e-5, 1e-7),
        ({"lr_base": 5e-4}, 5e-4 * 8 / 512, 5e-4 * 8 / 512 / 100),
        ({"lr_base": 5e-4, "accumulate": 4}, 5e-4 * 32 / 512, 5e-4 * 32 / 512 / 100),
        ({"lr_base": 5e-4, "lr": 0.1}, 0.1, 1e-5),
        ({"lr": 1e-6}, 1e-6, 1e-8),
    ],
)
def test_the_learning_rate_follows_the_images_per_update_unless_given(options, changes, lr, min_lr):
    settings = resolve(options(**changes), CPU, None)
    assert (settings.lr, settings.min_lr) == (pytest.approx(lr), pytest.approx(min_lr))
    assert settings.warmup_lr == pytest.approx(min(1e-6, lr / 100))
    shared = resolve(options(**changes), Place(torch.device("cpu"), 0, 4), None)
    assert shared.lr == pytest.approx(lr * (4 if "lr_base" in changes and "lr" not in changes else 1))


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (3, 0), (8, 2), (100, 5)])
def test_warmup_fits_any_number_of_epochs(options, epochs, warmup):
    assert resolve(options(epochs=epochs, warmup_epochs=None), CPU, None).warmup_epochs == warmup


def test_the_optimizer_gets_its_arguments_and_a_rate_for_each_layer(options):
    run = run_of(options(opt_kwargs={"eps": 1e-6, "betas": [0.8, 0.9]}, layer_decay=0.5, weight_decay=0.3))
    group = run.optimizer.param_groups[0]
    assert (group["eps"], list(group["betas"])) == (1e-6, [0.8, 0.9])
    scales = {group["lr_scale"] for group in run.optimizer.param_groups}
    assert len(scales) > 2
    assert max(scales) == 1
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays[id(run.model.head.weight)] == decays[id(run.model.blocks[0].attn.qkv.weight)] == 0.3
    spared = (run.model.head.bias, run.model.norm.weight, run.model.pos_embed, run.model.cls_token)
    assert [decays[id(parameter)] for parameter in spared] == [0] * 4


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"opt": "adam"}, True),
        ({"opt_kwargs": {"foreach": True}}, None),
        ({"opt_kwargs": {"fused": False}}, False),
        ({"opt": "sgd"}, None),
    ],
)
def test_adam_updates_all_tensors_in_one_call_on_a_cpu_unless_told_otherwise(options, changes, fused):
    assert {group.get("fused") for group in run_of(options(**changes)).optimizer.param_groups} == {fused}


def test_one_call_for_all_tensors_changes_no_more_than_roundings(options, tmp_path):
    changes = ({}, {"opt_kwargs": {"fused": False}, "output": str(tmp_path / "one by one")})
    losses = [train(options(layer_decay=0.5, weight_decay=0.3, **change)).step_losses for change in changes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_goes_on_by_one_call_from_a_checkpoint_that_was_written_without_it(options):
    settings = options(epochs=1, sched="none")
    train(settings)
    path = Path(settings.output) / "last.pt"
    state = load_checkpoint_state(path)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    save_checkpoint(path, state)
    train(options(epochs=2, sched="none", resume="auto"))
    assert all(group["fused"] for group in load_checkpoint_state(path)["optimizer"]["param_groups"])


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"sched": "step", "decay_epochs": 2.0, "decay_rate": 0.1}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"sched": "multistep", "decay_milestones": [1, 4], "decay_rate": 0.5}, [1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        ({"sched": "poly", "decay_rate": 1.0, "min_lr": 0.0}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"sched": "poly", "decay_rate": 1.0, "min_lr": 0.0, "cooldown_epochs": 2}, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
    ],
)
def test_schedules_have_their_settings(options, changes, rates):
    run = run_of(options(epochs=6, lr=1.0, warmup_epochs=0, **changes))
    found = []
    for epoch in range(6):
        run.scheduler.step_update(epoch * 10)
        found.append(run.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(rates, abs=1e-6)


def test_a_constant_rate_has_warmup_where_asked_and_a_rate_for_each_layer(options):
    assert resolve(options(epochs=100, warmup_epochs=None, sched="none"), CPU, None).warmup_epochs == 0
    run = run_of(options(epochs=6, lr=1.0, warmup_epochs=2, warmup_lr=0.2, sched="none", layer_decay=0.5))
    for update, rate in ((0, 0.2), (10, 0.6), (20, 1.0), (59, 1.0)):
        run.scheduler.step_update(update)
        assert [g["lr"] for g in run.optimizer.param_groups] == pytest.approx(
            [rate * g["lr_scale"] for g in run.optimizer.param_groups]
        )


@pytest.mark.parametrize(
    ("metric", "figures"),
    [("accuracy", [50, 10, 20, 15, 20, 5, 30, 1, 2, 3]), ("loss", [0.1, 0.9, 0.8, 0.85, 0.8, 0.95, 0.7, 2, 2, 2])],
)
def test_the_rate_falls_where_the_test_figures_do_not_get_better(options, metric, figures):
    """The epoch of warmup does not count, a fall starts the count anew, and the lowest rate is kept to."""
    plateau = {"sched": "plateau", "plateau_metric": metric, "patience_epochs": 1, "decay_rate": 0.5, "min_lr": 0.3}
    run = run_of(options(epochs=10, lr=1.0, warmup_epochs=1, warmup_lr=0.1, layer_decay=0.5, **plateau))
    rates = []
    for epoch, figure in enumerate(figures, 1):
        run.updates = 10 * epoch
        run.note_epoch({"epoch": epoch, f"test_{metric}": figure})
        rates.append(max(group["lr"] for group in run.optimizer.param_groups))
    assert rates == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3])


def test_a_run_that_waits_for_the_test_figures_goes_on_exactly(options, tmp_path):
    plateau = {"sched": "plateau", "patience_epochs": 0, "decay_rate": 0.1, "lr": 1e-3, "min_lr": 0.0}
    whole = train(options(epochs=4, output=str(tmp_path / "whole"), **plateau))
    rates = [record["lr"] for record in load_checkpoint_state(tmp_path / "whole" / "last.pt")["history"]]
    assert rates[-1] < 1e-3, "it is no test where the rate does not fall"
    for epochs in (2, 3):
        train(options(epochs=epochs, resume="auto", **plateau))
    assert train(options(epochs=4, resume="auto", **plateau)).step_losses == whole.step_losses


def test_warmup_begins_at_its_own_rate(options):
    run = run_of(options(epochs=6, lr=1.0, warmup_epochs=2, warmup_lr=0.2, min_lr=0.1))
    rates = []
    for update in (0, 10, 20, 60):
        run.scheduler.step_update(update)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2)
    assert rates[1] == pytest.approx(0.6)
    assert rates[0] < rates[1] < rates[2] > rates[3] == pytest.approx(0.1)


def test_averaging_has_its_decay(options):
    assert run_of(options(ema=True, ema_decay=0.99996)).ema.decay == 0.99996


def test_crops_have_their_sizes_and_ratios(options):
    settings = resolve_data_options(options(scale=[0.5, 0.6], ratio=[0.9, 1.1], hflip=0.0))
    split = open_split(settings, training=True)
    create_train_loader(split, settings, CONFIG, CPU)
    crop = split.images.transform.transforms[0]
    assert (list(crop.scale), list(crop.ratio)) == ([0.5, 0.6], [0.9, 1.1])


def test_mixing_has_its_probabilities_and_smoothing(options):
    mixup = run_of(options(mixup=0.8, cutmix=1.0, mixup_prob=0.3, mixup_switch_prob=0.7, label_smoothing=0.2)).mixup
    assert (mixup.mix_prob, mixup.switch_prob, mixup.label_smoothing) == (0.3, 0.7, 0.2)
    images, targets = torch.rand(8, 3, 4, 4), torch.arange(8) % 3
    never = run_of(options(mixup=0.8, mixup_prob=0.0, label_smoothing=0.0)).mixup
    assert torch.equal(never(images.clone(), targets)[0], images)


@pytest.mark.parametrize("world", [1, 2])
def test_repeated_augmentation_shows_images_several_times_in_as_many_steps(options, make_images, tmp_path, world):
    root = make_images(tmp_path / "many", {"train/a": 150, "train/b": 150})
    settings = resolve_data_options(options(data=str(root), aug_repeats=3))
    seen = []
    for rank in range(world):
        place = Place(torch.device("cpu"), rank, world)
        split = open_split(settings, training=True)
        loader = create_train_loader(split, settings, CONFIG, Place(torch.device("cpu")))
        if world > 1:
            sampler = RepeatAugSampler(split.images, place.world_size, place.rank, num_repeats=3)
        else:
            sampler = loader.sampler
            assert len(loader) == 256 // 8
            loader.sampler.set_epoch(1)
            assert next(iter(loader))[0].shape == (8, 3, 32, 32)
        seen += list(sampler)
    assert len(seen) == 256
    assert len(set(seen)) < 100


def test_a_run_with_repeated_augmentation_goes_on_exactly(options, tmp_path):
    whole = train(options(aug_repeats=3, sched="none", output=str(tmp_path / "whole")))
    train(options(aug_repeats=3, sched="none", epochs=1))
    assert train(options(aug_repeats=3, sched="none", resume="auto")).step_losses == whole.step_losses


def test_frozen_norms_stay_as_the_checkpoint_has_them(options, tmp_path):
    train(options(epochs=1))
    before = load_checkpoint_state(tmp_path / "run" / "last.pt")["model"]
    for fused in (False, True):
        output = tmp_path / f"tuned{fused}"
        train(options(checkpoint=str(tmp_path / "run" / "last.pt"), freeze_bn=True, fused=fused, output=str(output)))
        after = load_checkpoint_state(output / "last.pt")["model"]
        norms = [name for name in after if "running" in name]
        norms += [name.replace("running_mean", "weight") for name in norms if "running_mean" in name]
        assert len(norms) > 10
        assert all(torch.equal(after[name], before[name]) for name in norms)
        assert not torch.equal(after["head.weight"], before["head.weight"])


def test_a_head_of_another_size_is_replaced_by_itself(options, make_images, tmp_path, caplog):
    train(options(epochs=1))
    counts = {f"{split}/{name}": 6 for split in ("train", "val") for name in "vwxyz"}
    root = make_images(tmp_path / "others", counts)
    settings = options(checkpoint=str(tmp_path / "run" / "last.pt"), data=str(root), img_size=[48, 32])
    model = prepare_model(resolve(options(**{**vars(settings), "num_classes": 5}), CPU, None), CPU)
    weights = load_checkpoint_state(tmp_path / "run" / "last.pt")["model"]
    assert torch.equal(model.cls_token, weights["cls_token"])
    assert (model.head.out_features, model.grid_size) == (5, (3, 2))
    assert train(options(**{**vars(settings), "output": str(tmp_path / "tuned"), "epochs": 1})).epochs == 1


def test_metrics_are_written_as_lines_of_json_and_as_csv_with_a_picture(options, tmp_path):
    result = train(options())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == records
    assert all(record["test_top5"] == 100 for record in records)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = load_checkpoint_state(tmp_path / "run" / "last.pt")["model"]
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert result.parameters == sum(t.numel() for n, t in model.items() if not n.endswith(names))


def test_without_matplotlib_there_is_no_picture(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "ceit.runtime.plots", raising=False)
    train(options(epochs=1))
    assert not (tmp_path / "run" / "curves.png").exists()


def test_metrics_for_tensorboard(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UsageError, match=r"--tensorboard needs .*: pip install 'tensorboard'"):
            train(options(tensorboard=True))
    pytest.importorskip("tensorboard")
    train(options(tensorboard=True, epochs=1))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 2}, "--warmup-epochs must be below --epochs, 2, got 2"),
        ({"cooldown_epochs": 2}, "--cooldown-epochs must be below --epochs, 2, got 2"),
        ({"decay_rate": 0.5}, "--decay-rate is for --sched step or multistep or poly or plateau, not for cosine"),
        (
            {"sched": "step", "cooldown_epochs": 1},
            "--cooldown-epochs is for --sched cosine or tanh or poly, not for step",
        ),
        ({"sched": "plateau", "decay_rate": 1.0}, "--decay-rate must be below 1 with --sched plateau, got 1"),
        ({"sched": "plateau", "plateau_metric": "f1"}, "--plateau-metric must be one of accuracy, loss, got 'f1'"),
        ({"warmup_epochs": 1, "cooldown_epochs": 1, "epochs": 2, "warmup_lr": 0.1}, "--warmup-lr must be at most --lr"),
        ({"warmup_epochs": 2, "cooldown_epochs": 2, "epochs": 3}, "must fit in --epochs, 3, got 2 and 2"),
        ({"scale": [0.9, 0.1]}, "--scale must be the smaller number and the larger, got 0.9 0.1"),
        ({"scale": [0.9, 1.1]}, "--scale must be at most 1"),
        ({"ratio": [1.5, 0.5]}, "--ratio must be the smaller number and the larger, got 1.5 0.5"),
        ({"crop_pct": 1.1}, "--crop-pct must be at most 1, got 1.1"),
        ({"freeze_bn": True}, "--freeze-bn keeps what --checkpoint has, which is not given"),
        ({"data": "digits", "train_split": "a"}, "--train-split and --test-split do not belong to --data digits"),
        ({"exclude": ["head"]}, "--exclude says what is not read from --checkpoint, which is not given"),
        ({"freeze_bn": True, "sync_bn": True, "checkpoint": "x"}, "--freeze-bn and --sync-bn"),
        ({"fsdp": True}, "--fsdp needs several processes"),
        ({"fsdp": True, "amp": "float16"}, "--fsdp goes with neither --amp float16 nor --compile"),
        ({"mixup_prob": 1.5}, "--mixup-prob must be at most 1, got 1.5"),
        ({"layer_decay": 0.0}, "--layer-decay must be above 0"),
        ({"opt_kwargs": {"colour": 1}}, "--opt adamw: .*colour"),
        ({"opt_kwargs": {"lr": 1}}, "--opt-kwargs lr=1: give it as --lr"),
        ({"sched": "multistep", "decay_milestones": [3, 2]}, "--decay-milestones must rise, got 3 2"),
        ({"data": "digits", "download": True}, "--data-dir and --download belong to .*, not to --data digits"),
        ({"data_dir": "x"}, "--data-dir and --download belong to --data torch/NAME"),
        ({"data": "torch/imagenet"}, "--data torch/imagenet: expected one of torch/cifar10"),
        ({"data": "torch/cifar10"}, "--data torch/cifar10 needs --data-dir"),
        ({"train_split": "training"}, "expected a folder training/ in it"),
        ({"test_split": "held-out"}, "expected a folder held-out/ in it"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(options(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup_epochs": 1, "cooldown_epochs": 1},
        {"lr": 1e-5, "min_lr": 1e-5, "warmup_lr": 1e-5},
        {"scale": [0.5, 0.5], "ratio": [1.0, 1.0]},
        {"sched": "multistep", "decay_milestones": [1, 1]},
        {"crop_pct": 1.0, "hflip": 1.0, "layer_decay": 1.0, "seed": 2**32 - 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_may_be_as_large_as_what_bounds_them(options, changes):
    given = options(**changes)
    check(given)
    check_together(given)
    resolve(given, CPU, None)


def test_a_run_is_made_longer_and_loads_images_otherwise_when_it_goes_on(options, tmp_path):
    train(options(epochs=2))
    first = load_checkpoint_state(tmp_path / "run" / "last.pt")
    longer = train(options(epochs=4, workers=1, resume="auto"))
    assert longer.epochs == 4
    assert longer.step_losses[: 2 * 4] == first["step_losses"].tolist()
    with pytest.raises(UsageError, match=r"--epochs was 4, is 3 \(what may change: more --epochs, --workers"):
        train(options(epochs=3, resume="auto"))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "allowed"),
    [(8, 1, 1, True), (4, 1, 2, True), (2, 2, 2, True), (8, 1, 2, False), (4, 2, 1, False)],
)
def test_processes_may_change_where_an_update_sees_as_many_images(
    batch_size, accumulate, world_size, allowed, tmp_path
):
    common = {"epochs": 2, "sched": "cosine"}
    saved = {**common, "batch_size": 8, "accumulate": 1, "world_size": 1}
    now = {**common, "batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
    if allowed:
        check_same_options(saved, now, tmp_path)
    else:
        with pytest.raises(UsageError, match=r"--batch-size was 8|--world-size was 1"):
            check_same_options(saved, now, tmp_path)


def test_a_run_of_an_earlier_version_goes_on_where_an_option_did_not_exist(tmp_path):
    saved = {"epochs": 2, "sched": "cosine", "batch_size": 8, "accumulate": 1, "world_size": 1}
    check_same_options(saved, {**saved, "patience_epochs": TrainOptions().patience_epochs}, tmp_path)
    with pytest.raises(UsageError, match="--patience-epochs was 10, is 3"):
        check_same_options(saved, {**saved, "patience_epochs": 3}, tmp_path)


def test_sets_of_torchvision_train_and_evaluate(options, tmp_path, monkeypatch):
    import numpy as np
    from torchvision import datasets

    class Few(datasets.CIFAR10):
        def __init__(self, root, train, download):
            self.data = np.random.default_rng(train).integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
            self.targets, self.classes = [i % 3 for i in range(24)], ["a", "b", "c"]
            self.transform = self.target_transform = None
            assert (str(root), download) == (str(tmp_path), True)

    monkeypatch.setattr(datasets, "CIFAR10", Few)
    train(options(data="torch/cifar10", data_dir=str(tmp_path), download=True, epochs=1))
    path = tmp_path / "run" / "last.pt"
    assert load_checkpoint_state(path)["classes"] == ["a", "b", "c"]
    cifar = {"data": "torch/cifar10", "data_dir": str(tmp_path), "download": True}
    assert evaluate_checkpoint(EvaluateOptions(checkpoint=str(path), workers=0, device="cpu", **cifar)).images == 24
    with pytest.raises(
        UsageError, match="--test-split do not belong to --data torch/cifar10, whose splits have no names"
    ):
        open_split(EvaluateOptions(test_split="held-out", **cifar), training=False)
