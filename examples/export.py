"""Export: a fused model as a program of torch.export; whoever loads it imports ceit_kernels for the operators."""

import tempfile
from pathlib import Path

import torch

import ceit


def main() -> None:
    """Export, save, load and compare."""
    model = ceit.create_model("ceit_tiny_patch16_224", img_size=64, depth=2, fused=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceit.pt2"
        torch.export.save(torch.export.export(model, (images,)), path)
        loaded = torch.export.load(path).module()
        print(f"largest difference {(loaded(images) - model(images)).abs().max():.1e}")


if __name__ == "__main__":
    main()
