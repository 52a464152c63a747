"""Classes of pictures: `python -m ceit predict IMAGE...`."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .model import CeiT
from .runtime.building import input_arguments, numbered_classes, restore_model
from .runtime.distributed import processes
from .runtime.errors import UsageError, needed, usage_errors
from .runtime.fields import check
from .runtime.files import csv_text
from .runtime.machine import AMP_DTYPES, autocast, backend, check_graphs, for_inference, fused_operators
from .runtime.options import PredictOptions

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the first one first, and their probabilities."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(options: PredictOptions) -> list[Prediction]:
    """Predict the classes of pictures, and with `options.explain` draw what class-token attention looks at.

    Raises:
        UsageError: an option, an image or the checkpoint cannot be used.
    """
    check(options)
    paths = list(_pictures(options.images))
    with processes(options.device) as place, backend(options):
        if options.cuda_graphs:
            check_graphs(place.device)
        model, options, classes = restore_model(options)
        if not options.num_classes:
            raise UsageError("--checkpoint: it has no classifier")
        classes = classes or numbered_classes(options)
        config = resolve_model_data_config(model, args=input_arguments(options))
        config |= {} if options.crop_pct is None else {"crop_pct": options.crop_pct}
        transform: Any = create_transform(**config, is_training=False)
        model = model.to(place.device).eval()
        operators = fused_operators(model, place.device, AMP_DTYPES[options.amp])
        network = for_inference(model, operators, options.cuda_graphs)
        predictions = []
        for first in range(0, len(paths), options.batch_size):
            batch = paths[first : first + options.batch_size]
            pictures = [_open(path) for path in batch]
            inputs = torch.stack([transform(picture) for picture in pictures]).to(place.device)
            with torch.inference_mode(), autocast(place.device, options.amp):
                probabilities = network(inputs).float().softmax(1).cpu()
            found = probabilities.topk(min(options.topk, len(classes), probabilities.shape[1]))
            for path, values, indices in zip(batch, found.values.tolist(), found.indices.tolist(), strict=True):
                names = tuple(classes[i] if i < len(classes) else str(i) for i in indices)
                predictions.append(Prediction(str(path), names, tuple(values)))
            if options.explain is not None:
                _explain(model, inputs, pictures, predictions, Path(options.explain))
    return predictions


def rendered(predictions: Sequence[Prediction], form: str) -> str:
    """Predictions as a "table", "json" or "csv"."""
    if form == "json":
        answers = [
            {
                "image": p.image,
                "top": [{"class": c, "probability": v} for c, v in zip(p.classes, p.probabilities, strict=True)],
            }
            for p in predictions
        ]
        return json.dumps(answers, indent=2)
    rows = [
        {"image": p.image, "rank": rank, "class": name, "probability": f"{value:.6f}"}
        for p in predictions
        for rank, (name, value) in enumerate(zip(p.classes, p.probabilities, strict=True), 1)
    ]
    if form == "csv":
        return csv_text(rows).rstrip("\n")
    width = max(len(row["class"]) for row in rows)
    lines = []
    for row in rows:
        lines += [row["image"]] if row["rank"] == 1 else []
        lines.append(f"  {row['class']:<{width}}  {100 * float(row['probability']):6.2f}%")
    return "\n".join(lines)


@torch.no_grad()
def lca_attention(model: nn.Module, images: Tensor) -> Tensor:
    """What the last class token attends to in LCA: (B, heads, layers), each row adding up to 1.

    Args:
        model: a `CeiT`, plain or fused, in evaluation mode.
        images: (B, 3, H, W).
    """
    if not isinstance(model, CeiT):
        raise TypeError(f"model: expected a CeiT, got {type(model).__name__}")
    seen = []
    attention: Any = model.lca and model.lca.attn
    with attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        model(images)
    q, k, _ = attention.qkv(seen[0]).unflatten(2, (3, attention.num_heads, -1)).unbind(2)  # (B, L, H, D) each
    scores = torch.einsum("bhd,blhd->bhl", q[:, -1], k) * attention.scale
    return scores.float().softmax(-1)


def _pictures(given: Sequence[str]) -> Iterator[Path]:
    """The files among what was given, and those in the folders among it."""
    if not given:
        raise UsageError("IMAGE: expected at least one picture or folder")
    for word in given:
        path = Path(word)
        if not path.exists():
            raise UsageError(f"IMAGE {word}: there is no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"IMAGE {path}: no pictures in this folder")
        yield from found


def _open(path: Path) -> Image.Image:
    with usage_errors(f"IMAGE {path}"):
        if path.exists() and not path.is_file():
            raise UsageError(f"IMAGE {path}: it is a pipe or a device, expected a file")
        try:
            return Image.open(path).convert("RGB")
        except (Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(str(error)) from error


def _explain(
    model: nn.Module, inputs: Tensor, pictures: Sequence[Image.Image], predictions: Sequence[Prediction], folder: Path
) -> None:
    with needed("--explain", "ceit-kernels[demo]"):
        from .runtime.plots import draw_attention
    with usage_errors(f"--explain {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        attention = lca_attention(model, inputs).cpu()
        first = len(predictions) - len(pictures)
        for number, (picture, weights) in enumerate(zip(pictures, attention, strict=True), first):
            prediction = predictions[number]
            title = f"{Path(prediction.image).name}: {prediction.classes[0]}, {100 * prediction.probabilities[0]:.1f}%"
            name = f"{number + 1:03d}-{Path(prediction.image).stem}.png"
            draw_attention(picture, weights, title, folder / name)
