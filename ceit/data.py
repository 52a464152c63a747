"""Images: scikit-learn's digits or a folder, through timm's transforms and loaders."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import Dataset

from .runtime.distributed import Place
from .runtime.options import RunOptions, TrainOptions, UsageError, usage_errors

_TEST_FOLDERS = ("val", "validation", "test")
_DIGITS_SPLIT_SEED = 0
_AUGMENTATION = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5}
_DIGITS_AUGMENTATION = {"scale": [0.8, 1.0], "ratio": [0.85, 1.18], "hflip": 0.0}


class Digits(Dataset):
    """The 8x8 scans of handwritten digits that scikit-learn ships, as RGB images.

    The split is stratified, 80% for training (1,437 images) and 20% for testing (360), and always the same.

    Args:
        training: which part.
    """

    classes = tuple("0123456789")

    def __init__(self, training: bool):
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise UsageError("--data digits needs scikit-learn: pip install 'ceit-kernels[demo]'") from error
        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        split = train_test_split(
            images, digits.target, test_size=0.2, stratify=digits.target, random_state=_DIGITS_SPLIT_SEED
        )
        self.images, self.targets = (split[0], split[2]) if training else (split[1], split[3])
        self.transform = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), int(self.targets[index])


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split and the names of their classes, in the order of the labels."""

    images: Dataset
    classes: tuple[str, ...]


def open_split(data: str, training: bool) -> Split:
    """Open the training or the test images of `data`, without any transform.

    Args:
        data: "digits", or a folder with train/ and val/ (or validation/, test/), each with one folder per class.
        training: which of the two.

    Raises:
        UsageError: the folder or the split is missing or has no images.
    """
    if data == "digits":
        return Split(Digits(training), Digits.classes)
    root = Path(data)
    if not root.is_dir():
        raise UsageError(f"--data {data}: expected 'digits' or a folder, and there is no such folder")
    names = ("train",) if training else _TEST_FOLDERS
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UsageError(f"--data {data}: expected a folder {' or '.join(f'{name}/' for name in names)} in it")
    try:
        # search_split=False: timm would take the root itself where the split has no folder.
        images = create_dataset("", root=str(folder), search_split=False)
    except RuntimeError as error:
        raise UsageError(f"--data {data}: no images (.png, .jpg, .jpeg) in the class folders of {folder}") from error
    return Split(images, tuple(images.reader.class_to_idx))


def check_classes(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise `UsageError` unless both have the same classes; `where` says whose they are, e.g. "train/ and val/"."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        only = [
            f"{_listed(names)} only in the {which}" for names, which in ((missing, "first"), (extra, "second")) if names
        ]
        raise UsageError(f"--data: the classes of {where} differ: {', '.join(only)}")


def resolve_data_options(options: RunOptions) -> RunOptions:
    """Fill in the options whose default depends on the data: a digit that is flipped or cut is another character."""
    digits = options.data == "digits"
    defaults = {"crop_pct": 1.0 if digits else None}
    if isinstance(options, TrainOptions):
        defaults |= _DIGITS_AUGMENTATION if digits else _AUGMENTATION
    missing = {name: default for name, default in defaults.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def create_train_loader(split: Split, options: TrainOptions, config: dict[str, Any], place: Place) -> Iterable:
    """Batches of augmented training images, normalised on the device, in an order drawn from torch's generator.

    Args:
        split: the training images.
        options: training options with the data's defaults filled in.
        config: what `timm.data.resolve_model_data_config` says of the model: input_size, mean, std, interpolation.
        place: this process's device and rank; with several processes each gets its share, reshuffled by `set_epoch`.

    Raises:
        UsageError: fewer images than one batch, or an unknown augmentation policy.
    """
    share = len(split.images) // place.world_size
    if share < options.batch_size:
        raise UsageError(
            f"--batch-size {options.batch_size}: the training split has only {share} images per process, "
            "less than one batch"
        )
    if options.auto_augment is not None:
        with usage_errors(f"--auto-augment {options.auto_augment}"):
            create_transform(is_training=True, auto_augment=options.auto_augment)
    loader = create_loader(
        split.images,
        is_training=True,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        color_jitter=options.color_jitter or None,
        auto_augment=options.auto_augment,
        re_prob=options.random_erasing,
        re_mode="pixel",
        **_loader_arguments(options, config, place),
    )
    if place.distributed:
        loader.sampler.seed = options.seed
    return loader


def create_test_loader(split: Split, options: RunOptions, config: dict[str, Any], place: Place) -> Iterable:
    """Batches of test images in a fixed order, as `create_train_loader`.

    With several processes each gets every `world_size`-th image, some processes one more at the end that is a
    duplicate: `ceit.evaluate.evaluate` leaves it out.
    """
    crop_pct = options.crop_pct or config["crop_pct"]
    return create_loader(
        split.images, is_training=False, crop_pct=crop_pct, **_loader_arguments(options, config, place)
    )


def _loader_arguments(options: RunOptions, config: dict[str, Any], place: Place) -> dict[str, Any]:
    return {
        "input_size": config["input_size"],
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "distributed": place.distributed,
        "device": place.device,
        "pin_memory": place.device.type == "cuda",
        # Workers that live on would carry their random state over from epochs that a resumed run has not seen.
        "persistent_workers": False,
    }


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
