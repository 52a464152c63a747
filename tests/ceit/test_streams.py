"""Sets whose images can only be gone through in turn: tar files of WebDataset, by timm's reader."""

import io
import sys
import tarfile

import pytest
import torch
from PIL import Image

from ceit.data import create_test_loader, create_train_loader, open_split, resolve_data_options, shuffle
from ceit.evaluate import evaluate_checkpoint
from ceit.runtime.checkpoints import load_checkpoint_state
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.options import EvaluateOptions, RunOptions
from ceit.train import train

pytest.importorskip("webdataset")
CPU = Place(torch.device("cpu"))
CONFIG = {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest", "crop_pct": 1.0}


def write_tar(path, numbers):
    """Images that are all of one shade, their number, of three classes in turn."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            png = io.BytesIO()
            Image.new("RGB", (32, 32), (number,) * 3).save(png, "png")
            for name, contents in ((f"{number}.png", png.getvalue()), (f"{number}.cls", str(number % 3).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(contents)
                tar.addfile(entry, io.BytesIO(contents))


@pytest.fixture
def tars(options, tmp_path):
    """Options of a run on 20 training images in two files and 13 test images in two."""
    for name, numbers in (
        ("train-0", range(12)),
        ("train-1", range(12, 20)),
        ("val-0", range(5)),
        ("val-1", range(5, 13)),
    ):
        write_tar(tmp_path / f"{name}.tar", numbers)

    def make(**changes):
        splits = {"train_split": "train-{0..1}.tar|20", "test_split": "val-{0..1}.tar"}
        wds = {"data": "wds/shades", "data_dir": str(tmp_path), "num_classes": 3, **splits}
        return options(**{**wds, **changes})

    return make


def shades(loader):
    return [round(float(image[0, 0, 0]) * 255) for images, _ in loader for image in images]


def test_a_run_trains_and_its_checkpoint_is_evaluated(tars, tmp_path):
    result = train(tars(epochs=1))
    assert len(result.step_losses) == 3, "20 images are filled up to 24"
    path = tmp_path / "run" / "last.pt"
    assert load_checkpoint_state(path)["classes"] == ["0", "1", "2"]
    splits = {"data": "wds/shades", "data_dir": str(tmp_path), "test_split": "val-{0..1}.tar"}
    metrics = evaluate_checkpoint(
        EvaluateOptions(checkpoint=str(path), workers=0, device="cpu", output=str(tmp_path / "results"), **splits)
    )
    assert (metrics.images, metrics.top1) == (13, pytest.approx(result.accuracy))
    assert (tmp_path / "results" / "per_class.csv").read_text().startswith("class,images,top1\n0,5,")


def test_a_run_that_was_killed_goes_on_exactly(tars, tmp_path):
    settings = {"sched": "none", "random_erasing": 0.5}
    whole = train(tars(epochs=3, output=str(tmp_path / "whole"), **settings))
    train(tars(epochs=1, **settings))
    assert train(tars(epochs=3, resume="auto", **settings)).step_losses == whole.step_losses


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_has_an_order_of_its_own(tars, workers):
    settings = resolve_data_options(tars(train_split="train-0.tar|12", workers=workers, batch_size=4, scale=[1, 1]))
    loader = create_train_loader(open_split(settings, training=True), settings, CONFIG, CPU)
    orders = []
    for epoch in (0, 1, 0):
        torch.manual_seed(epoch)
        shuffle(loader, settings.seed, epoch)
        orders.append(shades(loader))
    assert orders[0] == orders[2] != orders[1]
    assert set(orders[0]) <= set(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_test_images_and_leave_none_out(tars, workers):
    settings, seen = tars(workers=workers), []
    for rank in range(3):
        place = Place(torch.device("cpu"), rank, 3)
        seen += shades(create_test_loader(open_split(settings, training=False), settings, CONFIG, place))
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": None}, "--num-classes must be given: the images come without the names of their classes"),
        ({"data_dir": None}, "--data wds/shades needs --data-dir"),
        ({"train_split": "train-{0..2}.tar|20"}, r"--data wds/shades: there is no file .*train-2\.tar"),
        ({"train_split": "train-0.tar"}, "--data wds/shades: .*num_samples not specified"),
        ({"train_split": "train"}, "--data wds/shades: split train not found"),
        ({"aug_repeats": 3}, "--data wds/shades goes with neither --aug-repeats nor --fsdp"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_named_before_anything_is_written(tars, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(tars(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reader", "package", "install"),
    [
        ("hfds", "datasets", "datasets"),
        ("tfds", "tensorflow", "tensorflow"),
        ("tfds", "tensorflow_datasets", "tensorflow-datasets"),
        ("wds", "webdataset", "webdataset"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, reader, package, install):
    monkeypatch.setitem(sys.modules, "tensorflow", torch)  # any module does
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"--data {reader}/x needs {package}: pip install '{install}'"):
        open_split(RunOptions(data=f"{reader}/x"), training=True)
