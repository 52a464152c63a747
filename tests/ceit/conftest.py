import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ceit.runtime.fields import flag
from ceit.runtime.options import TrainOptions

# A CeiT that trains in a second: two blocks of width 32.
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads cost more than they bring to models this small, and must be as many in children for equal numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def openvino_with_all_instructions(monkeypatch):
    """What holds PyTorch's oneDNN to fewer instructions would hold OpenVINO's too, which lacks code for the least."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.fixture
def make_images():
    """Make a folder of images, one hue for each class."""

    def make(root, counts):
        generator = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True)
            hue = [10 + 90 * (ord(os.path.basename(folder)[0]) % 3), 120, 200]
            for i in range(count):
                pixels = generator.integers(0, 60, (36, 40, 3)) + hue
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / folder / f"{i}.png")
        return root

    return make


@pytest.fixture
def image_folder(make_images, tmp_path):
    """Three classes with 34 training and 13 test images: neither is a multiple of the batch size, or of two."""
    counts = {"train/ant": 12, "train/bee": 11, "train/cat": 11, "val/ant": 5, "val/bee": 4, "val/cat": 4}
    return make_images(tmp_path / "images", counts)


@pytest.fixture
def options(image_folder, tmp_path):
    """Options of a run that takes a second, with changes."""

    def make(**changes):
        defaults = {
            "data": str(image_folder),
            "model_kwargs": SMALL,
            "img_size": 32,
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 8,
            "workers": 0,
            "device": "cpu",
            "fused": False,
            "output": str(tmp_path / "run"),
        }
        return TrainOptions(**{**defaults, **changes})

    return make


@pytest.fixture
def arguments_of():
    """The command line of a training run."""

    def arguments(settings):
        words = ["train"]
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if isinstance(value, dict):
                words += [flag(field.name), *(f"{name}={part}" for name, part in value.items())]
            elif isinstance(value, bool):
                words.append(flag(field.name) if value else flag(f"no_{field.name}"))
            elif isinstance(value, list):
                words += [flag(field.name), *map(str, value)] if value else []
            elif value is not None and not (field.name == "fused" and value == "auto"):
                words += [flag(field.name), str(value)]
        return words

    return arguments
