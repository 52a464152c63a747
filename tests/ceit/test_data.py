import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ceit.data import Digits, check_classes, create_test_loader, create_train_loader, open_split, resolve_data_options
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.options import RunOptions

CPU = Place(torch.device("cpu"))
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.5, 0.4, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def test_digits_are_split_in_a_fixed_stratified_way():
    training, test = Digits(True), Digits(False)
    np.random.seed(7)
    assert (len(training), len(test)) == (1437, 360)
    assert np.array_equal(Digits(False).images, test.images)
    assert np.abs(np.bincount(test.targets) - np.bincount(training.targets) / 4).max() < 1
    every = np.concatenate([training.images, test.images])
    assert sorted(map(bytes, every)) == sorted(map(bytes, _all_digits()))


def _all_digits():
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)


def test_digits_are_rgb_images_from_black_to_white():
    image, target = Digits(True)[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert 0 <= target <= 9
    assert (Digits(True).images.min(), Digits(True).images.max()) == (0, 255)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"--data digits needs sklearn: pip install 'ceit-kernels\[demo\]'"):
        open_split(RunOptions(data="digits"), training=True)


def test_digits_are_not_flipped_and_not_cropped_for_testing_unless_asked(options):
    digits = resolve_data_options(options(data="digits"))
    assert (digits.hflip, digits.scale, digits.ratio, digits.crop_pct) == (0.0, [0.8, 1.0], [0.85, 1.18], 1.0)
    folder = resolve_data_options(options())
    assert (folder.hflip, folder.scale, folder.ratio, folder.crop_pct) == (0.5, [0.08, 1.0], [3 / 4, 4 / 3], None)
    asked = resolve_data_options(options(data="digits", hflip=0.1, scale=[0.9, 1], crop_pct=0.8))
    assert (asked.hflip, asked.scale, asked.crop_pct) == (0.1, [0.9, 1], 0.8)
    assert resolve_data_options(RunOptions(data="digits")).crop_pct == 1.0


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_test_images_are_found_under_any_usual_name(make_images, tmp_path, name):
    root = make_images(tmp_path / "images", {"train/a": 1, "train/b": 2, f"{name}/a": 3, f"{name}/b": 4})
    split = open_split(RunOptions(data=str(root)), training=False)
    assert (len(split.images), split.classes) == (7, ("a", "b"))


@pytest.mark.parametrize(
    ("folders", "training", "message"),
    [
        ({}, True, "there is no such folder"),
        ({"val/a": 1}, True, "expected a folder train/ in it"),
        ({"train/a": 1}, False, "expected a folder val/ or validation/ or test/ in it"),
        ({"train/a": 0, "train/b": 0}, True, r"no images \(.png, .jpg, .jpeg\) in the class folders of"),
    ],
)
def test_folders_that_cannot_be_used_are_named(make_images, tmp_path, folders, training, message):
    root = make_images(tmp_path / "images", folders)
    with pytest.raises(UsageError, match=message) as error:
        open_split(RunOptions(data=str(root)), training)
    assert str(root) in str(error.value)


def test_classes_that_differ_are_listed():
    with pytest.raises(
        UsageError, match="--data: the classes of A and B differ: ape only in the first, elk, fox only in the second"
    ):
        check_classes(["ape", "cow"], ["cow", "elk", "fox"], "A and B")


def test_test_images_are_cropped_and_normalised(options):
    split = open_split(RunOptions(data="digits"), training=False)
    split.images.images = np.full_like(split.images.images, 255)
    images, targets = next(iter(create_test_loader(split, options(data="digits"), CONFIG, CPU)))
    assert images.shape == (8, 3, 32, 32)
    assert targets.tolist() == split.images.targets[:8].tolist()
    white = (1 - torch.tensor(CONFIG["mean"])) / torch.tensor(CONFIG["std"])
    torch.testing.assert_close(images, white[:, None, None].expand_as(images))


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_follow_torch_seed_in_every_epoch(options, workers):
    from timm.utils import random_seed

    settings = resolve_data_options(options(workers=workers, auto_augment="rand-m9-mstd0.5", random_erasing=0.5))
    loader = create_train_loader(open_split(settings, training=True), settings, CONFIG, CPU)

    def batches(seed):
        random_seed(seed)
        return torch.cat([images for images, _ in loader])

    first, second, again = batches(1), batches(2), batches(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
def test_policies_draw_any_strength_with_any_pillow(name):
    from timm.data.auto_augment import NAME_TO_OP

    image = Image.new("RGB", (4, 4), (200, 100, 50))
    values = [NAME_TO_OP[name](image, bits).getpixel((0, 0)) for bits in (0, 1, 4, 8)]
    assert values == [(0, 0, 0), (128, 0, 0), (192, 96, 48), (200, 100, 50)]


def test_fewer_images_than_a_batch_is_an_error(options):
    settings = resolve_data_options(options(batch_size=64))
    with pytest.raises(UsageError, match="--batch-size 64: the training split has only 34 images"):
        create_train_loader(open_split(settings, training=True), settings, CONFIG, CPU)
    settings = resolve_data_options(options(batch_size=34))
    assert len(create_train_loader(open_split(settings, training=True), settings, CONFIG, CPU)) == 1
