"""SegFormer of transformers, trained fused and served frozen: its feed-forward blocks are LeFF without norms."""

import copy

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import ceit_kernels


def main(side: int = 64) -> None:
    """Fuse a model, take the gradients of a step, and compare it with the plain one."""
    plain = SegformerForSemanticSegmentation(SegformerConfig(num_labels=5)).eval()  # or from_pretrained(...)
    model = ceit_kernels.fuse(copy.deepcopy(plain))  # the one line
    print(ceit_kernels.explain(model))

    images, labels = torch.randn(2, 3, side, side), torch.randint(5, (2, side, side))
    model(images, labels=labels).loss.backward()

    frozen = ceit_kernels.freeze(model)  # a snapshot for inference
    with torch.no_grad():
        print(f"largest difference {(frozen(images).logits - plain(images).logits).abs().max():.1e}")


if __name__ == "__main__":
    main()
