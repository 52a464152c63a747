"""A vision transformer of your own, with LeFF in the place of its MLPs."""

import torch
from torch import Tensor, nn

from ceit_kernels import FusedLeFF, fuse


class Block(nn.Module):
    """Self-attention, then LeFF, on tokens (B, 1 + H * W, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.leff = FusedLeFF(dim, hidden_features=4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Encode tokens."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.leff(self.norm2(x), residual=x)  # x + leff(...), added by the kernel


def main() -> None:
    """One step of training."""
    model = nn.Sequential(*(Block(64, num_heads=4) for _ in range(2)), nn.Linear(64, 10))
    fuse(model)  # in place: here the last layer, as LeFF is fused already
    tokens = torch.randn(8, 1 + 14 * 14, 64)
    logits = model(tokens)[:, 0]
    loss = nn.functional.cross_entropy(logits, torch.randint(10, (8,)))
    loss.backward()
    print(f"loss {loss:.3f}, gradient of LeFF's first weight {model[0].leff.conv1.weight.grad.norm():.3f}")


if __name__ == "__main__":
    main()
