import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ceit.evaluate
import ceit.train
from ceit.data import create_test_loader, open_split
from ceit.evaluate import evaluate, evaluate_checkpoint
from ceit.runtime.building import build_model
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.options import EvaluateOptions
from ceit.train import train
from ceit_kernels import Frozen, FusedLeFF

CPU = Place(torch.device("cpu"))
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


@pytest.fixture
def trained(options, tmp_path):
    settings = options(ema=True)
    return settings, train(settings), str(tmp_path / "run" / "last.pt")


def test_every_test_image_counts_once(options, monkeypatch):
    settings = options(num_classes=7)
    torch.manual_seed(0)
    model = build_model(settings)
    loader = create_test_loader(open_split(settings, training=False), settings, CONFIG, CPU)
    shown = []
    bar = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(ceit.evaluate, "progress_bar", lambda total, *_: nullcontext(shown.append(total) or bar))
    metrics = evaluate(model, loader, CPU)
    assert shown == [13, 8, 5]
    batches = list(loader)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model.eval()(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert metrics.images == len(targets) == 13
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics.top1 == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert metrics.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())


def test_with_fewer_than_five_classes_top5_is_100(options):
    settings = options()

    class Constant(nn.Module):
        def forward(self, x):
            return x.new_tensor([0.0, 1.0, 0.0]).expand(len(x), 3)

    loader = create_test_loader(open_split(settings, training=False), settings, CONFIG, CPU)
    metrics = evaluate(Constant(), loader, CPU)
    assert (metrics.top1, metrics.top5) == (pytest.approx(100 * 4 / 13), 100.0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_training_needs_no_description(trained, fused):
    settings, result, path = trained
    metrics = evaluate_checkpoint(
        EvaluateOptions(data=settings.data, checkpoint=path, ema=True, fused=fused, workers=0, device="cpu")
    )
    assert (metrics.top1, metrics.images) == (pytest.approx(result.accuracy), 13)


@pytest.fixture
def evaluated(monkeypatch):
    """The models that are evaluated, in their order."""
    models = []

    def note(model, *arguments):
        models.append(model)
        return evaluate(model, *arguments)

    monkeypatch.setattr(ceit.evaluate, "evaluate", note)
    monkeypatch.setattr(ceit.train, "evaluate", note)
    return models


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_a_fused_checkpoint_is_evaluated_frozen_and_a_plain_one_plain(trained, evaluated, amp):
    settings, _, path = trained
    common = {"data": settings.data, "checkpoint": path, "amp": amp, "workers": 0, "device": "cpu"}
    fused, plain = (evaluate_checkpoint(EvaluateOptions(**common, fused=fused)) for fused in (True, False))
    frozen, live = evaluated
    assert isinstance(frozen, Frozen)
    assert not list(frozen.parameters())
    assert not isinstance(live, Frozen)
    assert not any(isinstance(module, FusedLeFF) for module in live.modules())
    assert fused.images == plain.images
    assert fused.loss == pytest.approx(plain.loss, rel=1e-4 if amp == "none" else 1e-2)


def test_fused_operators_are_run_by_the_backend_that_is_asked_for(trained, caplog):
    settings, _, path = trained
    common = {"data": settings.data, "checkpoint": path, "fused": True, "workers": 0, "device": "cpu"}
    with caplog.at_level("INFO", logger="ceit.evaluate"):
        evaluate_checkpoint(EvaluateOptions(**common, backend="reference"))
    assert "'leff': 'reference'" in caplog.text
    assert "native" not in caplog.text
    with pytest.raises(UsageError, match="triton"):
        evaluate_checkpoint(EvaluateOptions(**common, backend="leff=triton"))


def test_validation_during_training_sees_live_weights(options, evaluated):
    settings = options(fused=True)
    result = train(settings)
    assert len(evaluated) == settings.epochs > 1
    assert not any(isinstance(model, Frozen) for model in evaluated)
    path = f"{settings.output}/last.pt"
    last = evaluate_checkpoint(EvaluateOptions(data=settings.data, checkpoint=path, workers=0, device="cpu"))
    assert result.accuracy == pytest.approx(last.top1)


def test_averaged_and_last_weights_are_told_apart(trained):
    settings, _, path = trained
    losses = {
        ema: evaluate_checkpoint(
            EvaluateOptions(data=settings.data, checkpoint=path, ema=ema, workers=0, device="cpu")
        ).loss
        for ema in (True, False)
    }
    assert losses[True] != losses[False]


def test_another_image_size_resamples_the_positions(trained):
    settings, _, path = trained
    options = EvaluateOptions(data=settings.data, checkpoint=path, img_size=64, workers=0, device="cpu")
    assert evaluate_checkpoint(options).images == 13


def test_anothers_checkpoint_needs_the_model_name(trained, tmp_path):
    settings, _, path = trained
    weights = torch.load(path, weights_only=True)["model"]
    bare = str(tmp_path / "bare.pt")
    torch.save(weights, bare)
    common = {"data": settings.data, "checkpoint": bare, "workers": 0, "device": "cpu"}
    with pytest.raises(UsageError, match=r"not one of `ceit train`.*for another's checkpoint give --model"):
        evaluate_checkpoint(EvaluateOptions(**common))
    described = {"model": "ceit_tiny_patch16_224", "model_kwargs": settings.model_kwargs, "img_size": 32}
    ours = evaluate_checkpoint(EvaluateOptions(data=settings.data, checkpoint=path, workers=0, device="cpu"))
    assert evaluate_checkpoint(EvaluateOptions(**common, **described)) == ours


def test_images_of_other_classes_are_named(trained, make_images, tmp_path):
    root = make_images(tmp_path / "other", {"val/ant": 2, "val/dog": 2})
    with pytest.raises(UsageError, match="classes of the checkpoint and the test images differ: bee, cat only in the"):
        evaluate_checkpoint(EvaluateOptions(data=str(root), checkpoint=trained[2], workers=0, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint must be given, unless --model is a folder"),
        ({"checkpoint": "nowhere.pt"}, "checkpoint nowhere.pt does not exist"),
        ({"model": "ceit_tiny_patch16_224"}, "--checkpoint: checkpoint .* does not match the model"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_used_are_named(trained, changes, message):
    settings, _, path = trained
    options = {"data": settings.data, "checkpoint": path, "workers": 0, "device": "cpu", **changes}
    with pytest.raises(UsageError, match=message):
        evaluate_checkpoint(EvaluateOptions(**options))


def test_results_of_each_class_and_a_picture_are_left_in_a_folder(trained, tmp_path):
    settings, _, path = trained
    options = EvaluateOptions(
        data=settings.data, checkpoint=path, output=str(tmp_path / "results"), workers=0, device="cpu"
    )
    metrics = evaluate_checkpoint(options)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert (results["top1"], results["top5"], results["images"]) == (metrics.top1, 100.0, 13)
    assert results["parameters"] > 1000
    assert [(r["class"], r["images"]) for r in results["per_class"]] == [("ant", 5), ("bee", 4), ("cat", 4)]
    correct = sum(r["images"] * r["top1"] / 100 for r in results["per_class"])
    assert 100 * correct / 13 == pytest.approx(metrics.top1)
    assert int(metrics.confusion.sum()) == 13
    lines = (tmp_path / "results" / "per_class.csv").read_text().splitlines()
    assert lines[0] == "class,images,top1"
    assert len(lines) == 4
    assert (tmp_path / "results" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_classes_is_the_files(trained, tmp_path):
    settings, _, path = trained
    weights = torch.load(path, weights_only=True)["model"]
    weights |= {"head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}
    torch.save({"model": weights}, tmp_path / "official.pth")
    described = {"model": settings.model, "model_kwargs": settings.model_kwargs, "img_size": 32}
    common = {"data": settings.data, "checkpoint": str(tmp_path / "official.pth"), "workers": 0, "device": "cpu"}
    assert evaluate_checkpoint(EvaluateOptions(**common, **described)).confusion.shape == (9, 9)


def test_a_flat_folder_of_classes_is_evaluated(trained):
    settings, _, path = trained
    options = EvaluateOptions(data=f"{settings.data}/val", checkpoint=path, workers=0, device="cpu")
    assert evaluate_checkpoint(options).images == 13
    named = EvaluateOptions(data=settings.data, test_split="train", checkpoint=path, workers=0, device="cpu")
    assert evaluate_checkpoint(named).images == 34
