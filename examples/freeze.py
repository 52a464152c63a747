"""Inference: a snapshot of a model, with its weights folded and prepacked once."""

import time

import torch

import ceit
from ceit_kernels import freeze


def main(calls: int = 3) -> None:
    """Compare a plain model with its frozen snapshot."""
    model = ceit.create_model("ceit_tiny_patch16_224", fused=False).eval()
    frozen = freeze(model)  # the model stays as it is; later changes of its weights do not reach the snapshot
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        print(f"largest difference {(frozen(images) - model(images)).abs().max():.1e}")
        for name, function in (("plain", model), ("frozen", frozen)):
            start = time.perf_counter()
            for _ in range(calls):
                function(images)
            print(f"{name}: {1e3 * (time.perf_counter() - start) / calls:.1f} ms an image")


if __name__ == "__main__":
    main()
