"""Training: `fused` is the one flag; everything else is an ordinary loop."""

import torch
from torch.nn.functional import cross_entropy

import ceit


def main(steps: int = 4) -> None:
    """Train the same small CeiT plain and fused, and print the losses, which agree to rounding."""
    for fused in (False, True):
        torch.manual_seed(0)
        model = ceit.create_model("ceit_tiny_patch16_224", img_size=64, depth=2, num_classes=10, fused=fused)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            images, classes = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
            loss = cross_entropy(model(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(f"{loss.item():.4f}")
        print("fused" if fused else "plain", *losses)


if __name__ == "__main__":
    main()
