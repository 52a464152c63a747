"""Models in other formats, each compared with the model before it is kept: `python -m ceit export`."""

import dataclasses
import importlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor
from torch.export import Dim

from ceit_kernels import unfuse

from .registry import create_model
from .runtime.building import build_model, restore_model
from .runtime.errors import UsageError, needed, usage_errors
from .runtime.fields import check, plain
from .runtime.files import claimed
from .runtime.options import ExportOptions

_logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
_EXTRA = "ceit-kernels[export]"
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


class ExportFailed(RuntimeError):
    """What was exported does not give the model's outputs, or cannot be made; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on the CPU, in evaluation mode, and what is known of it."""

    model: Any
    options: ExportOptions
    classes: tuple[str, ...] | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.model.i2t.img_size


def export(options: ExportOptions) -> list[Path]:
    """Write a model in other formats, for any number of images.

    pt2 is torch.export's, which `torch.export.load` reads; hub is the layout of timm's hub checkpoints, a folder for
    `ceit.create_model` and timm. Fused operators are run by plain PyTorch in what is exported, but for `options.fused`.
    A file is kept only if its outputs differ from the model's by no more than 1e-4 of the largest.

    Returns:
        The files, or the folder for hub.

    Raises:
        UsageError: an option or the checkpoint cannot be used, or a package is missing.
        ExportFailed: a format cannot be made of this model, or its outputs differ.
    """
    check(options)
    if options.fused and list(options.format) != ["pt2"]:
        raise UsageError("--fused: only pt2 can hold fused operators, give it alone")
    for name in options.format:
        _import_needed(name)
    model, options, classes = restore_model(options)
    source = Source(model.eval() if options.fused else unfuse(model.eval()), options, classes)
    images = [torch.randn(n, 3, *source.size, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3)]
    with torch.no_grad():
        expected = [source.model(x) for x in images]
    written = []
    with claimed(Path(options.output)) as output:
        for name in options.format:
            written.append(_export_one(name, source, images, expected, output))
            _logger.info("%s: outputs are the model's to %g, saved %s", name, TOLERANCE, written[-1])
    return written


def _export_one(name: str, source: Source, images: Sequence[Tensor], expected: Sequence[Tensor], output: Path) -> Path:
    write, load = _FORMATS[name]
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.", suffix=".partial") as folder:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                path = write(source, images[0], Path(folder))
                function = load(path, source)
                difference = max(_difference(function(x), y) for x, y in zip(images, expected, strict=True))
        except UsageError:
            raise
        except Exception as error:
            first_line = str(error).strip().splitlines()[:1]
            raise ExportFailed(f"{name}: {type(error).__name__} {''.join(first_line)}") from error
        if not difference <= TOLERANCE:
            raise ExportFailed(f"{name}: outputs differ from the model's by {difference:.2g}, expected {TOLERANCE:g}")
        with usage_errors(f"--output {output}"):
            for made in sorted(Path(folder).iterdir()):
                target = output / made.name
                if target.is_dir():
                    shutil.rmtree(target)
                made.replace(target)
    return output / path.name


def _difference(found: Any, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that exceeds one."""
    found = torch.as_tensor(found)
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _import_needed(name: str) -> None:
    with needed(f"--format {name}", _EXTRA):
        for package in _PACKAGES.get(name, ()):
            importlib.import_module(package)


def _write_pt2(source: Source, images: Tensor, folder: Path) -> Path:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(source.model, (images,), dynamic_shapes=({0: Dim("batch")},)), path)
    return path


def _load_pt2(path: Path, source: Source) -> Callable:
    return torch.export.load(path).module()


def _write_onnx(source: Source, images: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    torch.onnx.export(
        source.model,
        (images,),
        path,
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim("batch")},),
        verbose=False,
    )
    return path


def _load_onnx(path: Path, source: Source) -> Callable:
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def _write_openvino(source: Source, images: Tensor, folder: Path) -> Path:
    openvino = importlib.import_module("openvino")
    path = folder / "model.xml"
    converted = openvino.convert_model(source.model, example_input=images)
    openvino.save_model(converted, path, compress_to_fp16=False)
    return path


def _load_openvino(path: Path, source: Source) -> Callable:
    compiled = importlib.import_module("openvino").compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images.numpy())[0]


def _write_safetensors(source: Source, images: Tensor, folder: Path) -> Path:
    path = folder / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in source.model.state_dict().items()}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return path


def _load_safetensors(path: Path, source: Source) -> Callable:
    if source.options.checkpoint is None:
        model = create_model(str(source.options.model), fused=False)
    else:
        model = build_model(dataclasses.replace(source.options, fused=False))
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def _write_hub(source: Source, images: Tensor, folder: Path) -> Path:
    model, options = source.model, source.options
    arguments = {**plain(options)["model_kwargs"], "img_size": list(source.size)}
    config = {"num_classes": model.num_classes, "pretrained_cfg": {"input_size": [3, *source.size]}}
    if source.classes is not None:
        config["label_names"] = list(source.classes)
    path: Any = folder / "hub"
    path.mkdir()
    save_config_for_hf(model, path / "config.json", config, arguments)
    return _write_safetensors(source, images, path).parent


def _load_hub(path: Path, source: Source) -> Callable:
    return create_model(str(path), fused=False).eval()


_FORMATS: dict[str, tuple[Callable[[Source, Tensor, Path], Path], Callable[[Path, Source], Callable]]] = {
    "pt2": (_write_pt2, _load_pt2),
    "onnx": (_write_onnx, _load_onnx),
    "openvino": (_write_openvino, _load_openvino),
    "safetensors": (_write_safetensors, _load_safetensors),
    "hub": (_write_hub, _load_hub),
}
