"""Images: scikit-learn's digits, folders and sets of timm's readers, through timm's transforms and loaders."""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from timm.data import IterableImageDataset, create_dataset, create_loader, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets

from .runtime.distributed import Place
from .runtime.errors import UsageError, needed, usage_errors
from .runtime.options import RunOptions, TrainOptions

_Options = TypeVar("_Options", bound=RunOptions)
_TEST_FOLDERS = ("val", "validation", "test")
_DIGITS_SPLIT_SEED = 0
_WITHOUT_SPLITS = ("digits", "torch/cifar10", "torch/cifar100")
_AUGMENTATION = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5}
_DIGITS_AUGMENTATION = {"scale": [0.8, 1.0], "ratio": [0.85, 1.18], "hflip": 0.0}


def _posterize(image: Image.Image, bits: int, **others: Any) -> Image.Image:
    """timm's, which asks for as few as no bits at all: black, as in Pillow before 13, which refuses that."""
    return timm_posterize(image, bits, **others) if bits else Image.new(image.mode, image.size)


NAME_TO_OP.update({name: _posterize for name, operation in NAME_TO_OP.items() if operation is timm_posterize})


class Digits(Dataset):
    """The 8x8 scans of handwritten digits that scikit-learn ships, as RGB images.

    The split is stratified, 80% for training (1,437 images) and 20% for testing (360), and always the same.

    Args:
        training: which part.
    """

    classes = tuple("0123456789")

    def __init__(self, training: bool):
        with needed("--data digits", "ceit-kernels[demo]"):
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        digits: Any = load_digits()
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
    """The images of one split and the names of their classes, by label; none where nothing has them."""

    images: Any  # a Dataset with a transform
    classes: tuple[str, ...]

    @property
    def streamed(self) -> bool:
        """Whether the images can only be gone through in turn."""
        return isinstance(self.images, IterableImageDataset)


def open_split(options: RunOptions, training: bool) -> Split:
    """Open the training or the test images of `options.data`, without any transform.

    Args:
        options: `data` is "digits", a folder with one folder of images per class in each split's, or READER/NAME. Test
            images may also lie in the class folders of `data` itself, where no split has a folder.
        training: which of the two.

    Raises:
        UsageError: the folder or the split is missing or has no images, or a package that reads them is.
    """
    data = options.data
    if data in _WITHOUT_SPLITS and (options.train_split != "train" or options.test_split not in (None, "test")):
        raise UsageError(f"--train-split and --test-split do not belong to --data {data}, whose splits have no names")
    reader, _, name = data.partition("/")
    if reader in _READERS and name and not Path(data).is_dir():
        with usage_errors(f"--data {data}"):
            return _open_torchvision(name, options, training) if reader == "torch" else _open_by_timm(options, training)
    if options.data_dir or options.download:
        raise UsageError(f"--data-dir and --download belong to --data {_SETS}, not to --data {data}")
    if data == "digits":
        return Split(Digits(training), Digits.classes)
    root = Path(data)
    if not root.is_dir():
        raise UsageError(f"--data {data}: expected 'digits', a folder or {_SETS}, and there is no such folder")
    folder = _split_folder(root, options, training)
    try:
        # search_split=False: timm would take the root itself where the split has no folder.
        images = create_dataset("", root=str(folder), search_split=False)
    except RuntimeError as error:
        raise UsageError(f"--data {data}: no images (.png, .jpg, .jpeg) in the class folders of {folder}") from error
    return _named_by_reader(images)


def _split_folder(root: Path, options: RunOptions, training: bool) -> Path:
    test_folders = (options.test_split,) if options.test_split else _TEST_FOLDERS
    names = (options.train_split,) if training else test_folders
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None and not training and not options.test_split and not (root / options.train_split).is_dir():
        folder = root
    if folder is None:
        raise UsageError(f"--data {root}: expected a folder {' or '.join(f'{name}/' for name in names)} in it")
    return folder


def _split_name(options: RunOptions, training: bool) -> str:
    return options.train_split if training else options.test_split or "test"


def _open_torchvision(name: str, options: RunOptions, training: bool) -> Split:
    sets = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "flowers102": datasets.Flowers102}
    if name not in sets:
        raise UsageError(f"--data torch/{name}: expected one of {', '.join(f'torch/{known}' for known in sets)}")
    if options.data_dir is None:
        raise UsageError(f"--data torch/{name} needs --data-dir, the folder where it is or with --download goes")
    which = {"train": training} if name.startswith("cifar") else {"split": _split_name(options, training)}
    images = sets[name](options.data_dir, download=options.download, **which)
    classes = getattr(images, "classes", range(102))
    return Split(images, tuple(map(str, classes)))


def _open_by_timm(options: RunOptions, training: bool) -> Split:
    """A set of Hugging Face, TensorFlow Datasets or WebDataset."""
    reader = options.data.partition("/")[0]
    for package in _READERS[reader]:
        with needed(f"--data {options.data}", package.replace("_", "-")):
            importlib.import_module(package)
    if reader == "wds" and options.data_dir is None:
        raise UsageError(f"--data {options.data} needs --data-dir, the folder or the address of its tar files")
    images: Any = create_dataset(
        options.data,
        root=options.data_dir,
        split=_split_name(options, training),
        is_training=training,
        batch_size=options.batch_size,
        download=options.download,
        seed=options.seed if isinstance(options, TrainOptions) else 0,
    )
    if reader == "wds":
        _check_files(images.reader, options.data)
    return _named_by_reader(images)


def _check_files(reader: Any, data: str) -> None:
    """Name a tar file that is not there, which the reader would leave out."""
    for name in reader.split_info.filenames:
        path = Path(reader.root, name)
        if ":" not in f"{reader.root}{name}" and not path.is_file():
            raise UsageError(f"--data {data}: there is no file {path}")


def _named_by_reader(images: Any) -> Split:
    """Images with the names of classes that timm's reader found."""
    return Split(images, tuple(images.reader.class_to_idx))


# The readers of sets, and the packages that they need beside the extra.
_READERS = {
    "torch": (),
    "hfds": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "wds": ("webdataset",),
}
_SETS = " or ".join(f"{reader}/NAME" for reader in _READERS)


def check_classes(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise `UsageError` unless both have the same classes; `where` says whose they are, e.g. "train/ and val/"."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        only = [
            f"{_listed(names)} only in the {which}" for names, which in ((missing, "first"), (extra, "second")) if names
        ]
        raise UsageError(f"--data: the classes of {where} differ: {', '.join(only)}")


def resolve_data_options(options: _Options) -> _Options:
    """Fill in the options whose default depends on the data: a digit that is flipped or cut is another character."""
    digits = options.data == "digits"
    defaults = {"crop_pct": 1.0 if digits else None}
    if isinstance(options, TrainOptions):
        defaults |= _DIGITS_AUGMENTATION if digits else _AUGMENTATION
        defaults["warmup_epochs"] = 0 if options.sched == "none" else min(5, options.epochs // 4)
    missing = {name: default for name, default in defaults.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def create_train_loader(split: Split, options: TrainOptions, config: dict[str, Any], place: Place) -> Any:
    """Batches of augmented training images, normalised on the device, in an order drawn from torch's generator.

    Args:
        split: the training images.
        options: training options with the data's defaults filled in.
        config: what `timm.data.resolve_model_data_config` says of the model: input_size, mean, std, interpolation.
        place: this process's device and rank.

    Raises:
        UsageError: fewer images than one batch, an unknown augmentation policy, or images that can only be gone through
            in turn where that does not do.
    """
    if options.auto_augment is not None:
        with usage_errors(f"--auto-augment {options.auto_augment}"):
            create_transform(is_training=True, auto_augment=options.auto_augment)
    arguments = _loader_arguments(options, config, place) | {
        "scale": options.scale,
        "ratio": options.ratio,
        "hflip": options.hflip,
        "color_jitter": options.color_jitter or None,
        "auto_augment": options.auto_augment,
        "re_prob": options.random_erasing,
        "re_mode": "pixel",
    }
    if split.streamed and (options.aug_repeats or options.fsdp):
        raise UsageError(
            f"--data {options.data} goes with neither --aug-repeats nor --fsdp: its images have no numbers"
        )
    loader: Any = create_loader(split.images, is_training=True, **arguments)
    if split.streamed:  # the reader fills up the last batch
        return loader
    if options.aug_repeats:
        # Earlier versions of timm round small sets down to nothing.
        rounded: dict[str, Any] = {} if len(split.images) >= 256 else {"selected_round": 0}
        sampler = RepeatAugSampler(
            split.images, place.world_size, place.rank, num_repeats=options.aug_repeats, **rounded
        )
        loader.loader = _with_sampler(loader.loader, sampler)
    share = len(loader.sampler)
    if share < options.batch_size:
        raise UsageError(
            f"--batch-size {options.batch_size}: the training split has only {share} images per process, "
            "less than one batch"
        )
    return loader


def _with_sampler(loader: DataLoader, sampler: Sampler) -> DataLoader:
    """The loader with another order of images; timm's takes repeated augmentation only of several processes."""
    names = ("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "worker_init_fn")
    return DataLoader(loader.dataset, sampler=sampler, **{name: getattr(loader, name) for name in names})


def shuffle(loader: Any, seed: int, epoch: int) -> None:
    """Draw the order of an epoch's images, the same whichever epochs this process has seen before."""
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(seed + epoch)
    if isinstance(loader.dataset, IterableImageDataset):
        loader.dataset.set_epoch(epoch)
        # Without workers the reader would go on with the generator of the epoch before.
        reader: Any = loader.dataset.reader
        reader.ds, reader.worker_seed = None, seed + epoch


class _Share:
    """Of a reader's images every `world_size`-th, the share of a process."""

    def __init__(self, reader: Any, place: Place):
        # Told of the other processes it would itself give each as many, and leave some out.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        self.reader, self.rank, self.world_size = reader, place.rank, place.world_size

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return islice(self.reader, self.rank, None, self.world_size)


def create_test_loader(split: Split, options: RunOptions, config: dict[str, Any], place: Place) -> Any:
    """Batches of test images in a fixed order, as `create_train_loader`.

    With several processes each gets every `world_size`-th image, some processes one more at the end that is a
    duplicate: `ceit.evaluate.evaluate` leaves it out.
    """
    if split.streamed:
        split.images.reader = _Share(split.images.reader, place)
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
