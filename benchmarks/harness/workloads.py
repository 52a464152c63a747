"""The workloads that are timed: an operator or a model at one size, phase, dtype and batch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ceit.layers import AddNorm, Attention, Image2Tokens, LCAAttention, LocallyEnhancedFeedForward
from ceit.registry import create_model

__all__ = ["OPERATORS", "Workload", "has_bfloat16", "plan"]

OPERATORS = ("leff", "i2t", "lca", "attention", "add_norm", "model")
_CHANNELS = {"tiny": 192, "small": 384}
_HEAD_DIM, _LAYERS, _TOKENS = 64, 12, 197


class Residual(nn.Module):
    """The residual path of a block, with a linear layer in the place of attention and of LeFF.

    Without these `torch.compile` would fuse one norm into the next, which no block allows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_norm = AddNorm()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention, self.feed_forward = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        x, y = self.add_norm(x, None, self.norm1)
        x, y = self.add_norm(x, self.attention(y), self.norm2)
        return x + self.feed_forward(y)


@dataclass(frozen=True)
class Workload:
    """What the implementations of one comparison compute.

    Attributes:
        operator: one of `OPERATORS`.
        size: "tiny" or "small".
        phase: "inference" or "training", which is forward and backward without an optimizer.
        dtype: "float32", "bfloat16" or "float16", of parameters and activations.
        batch: images.
        image_size: side in pixels; for models and the stem.
        model_kwargs: further arguments of the model.
    """

    operator: str
    size: str
    phase: str
    dtype: str
    batch: int
    image_size: int = 224
    model_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The workload's name, as `--only` takes it."""
        return f"{self.operator}-{self.size}-{self.phase}-{self.dtype}-b{self.batch}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch has it."""
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input."""
        if self.operator in ("model", "i2t"):
            return self.batch, 3, self.image_size, self.image_size
        return self.batch, _LAYERS if self.operator == "lca" else _TOKENS, _CHANNELS[self.size]

    @property
    def input_gradient(self) -> bool:
        """Whether training computes the gradient of the input: images need none."""
        return self.phase == "training" and len(self.shape) == 3

    @property
    def served(self) -> bool:
        """Whether it is measured frozen too: inference of what is served as it is."""
        return self.phase == "inference" and self.operator in ("leff", "model")

    def make_module(self) -> nn.Module:
        """The plain module on the CPU in float32, the same one in every process, in the phase's mode."""
        torch.manual_seed(0)
        channels = _CHANNELS[self.size]
        make: dict[str, Callable[[], nn.Module]] = {
            "leff": lambda: LocallyEnhancedFeedForward(channels, 4 * channels),
            "i2t": Image2Tokens,
            "lca": lambda: LCAAttention(channels, channels // _HEAD_DIM, qkv_bias=True),
            "attention": lambda: Attention(channels, channels // _HEAD_DIM, qkv_bias=True),
            "add_norm": lambda: Residual(channels),
            "model": lambda: create_model(
                f"ceit_{self.size}_patch16_224", fused=False, img_size=self.image_size, **self.model_kwargs
            ),
        }
        module = make[self.operator]()
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            # Fresh statistics are those of no norm at all, which would hide a wrong folding.
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        return module.train(self.phase == "training")

    def make_inputs(self, count: int, device: torch.device) -> list[Tensor]:
        """`count` inputs on a device, the same in every process."""
        generator = torch.Generator().manual_seed(1)
        inputs = (torch.randn(self.shape, generator=generator) for _ in range(count))
        return [x.to(device, self.torch_dtype).requires_grad_(self.input_gradient) for x in inputs]


# Operator, sizes, dtypes and batches by phase, in the order of importance: what comes last is left out when time is up.
_Plan = tuple[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, tuple[int, ...]]], ...]
_BOTH, _FLOAT32 = ("tiny", "small"), ("float32",)
_CPU_PLAN: _Plan = (
    ("leff", _BOTH, _FLOAT32, {"inference": (16,), "training": (16,)}),
    ("model", ("tiny",), _FLOAT32, {"inference": (1, 4, 16), "training": (8,)}),
    ("i2t", ("tiny",), _FLOAT32, {"inference": (16,), "training": (8,)}),
    ("attention", ("tiny",), _FLOAT32, {"inference": (16,), "training": (8,)}),
    ("lca", ("tiny",), _FLOAT32, {"inference": (16,), "training": (16,)}),
    ("add_norm", ("tiny",), _FLOAT32, {"inference": (16,), "training": (16,)}),
    ("model", ("small",), _FLOAT32, {"inference": (1,), "training": (8,)}),
    ("model", ("small",), _FLOAT32, {"inference": (16,)}),
    ("leff", _BOTH, _FLOAT32, {"inference": (1,)}),
    ("i2t", ("tiny",), _FLOAT32, {"inference": (1,)}),
    ("lca", ("small",), _FLOAT32, {"inference": (16,), "training": (16,)}),
    ("add_norm", ("small",), _FLOAT32, {"inference": (16,), "training": (16,)}),
)
_CPU_BFLOAT16_PLAN: _Plan = (("model", _BOTH, ("bfloat16",), {"inference": (1, 16)}),)
_GPU_DTYPES = ("bfloat16", "float32")
_GPU_PLAN: _Plan = tuple(
    (operator, ("tiny",) if operator == "i2t" else _BOTH, (dtype,), batches)
    for dtype in _GPU_DTYPES
    for batches in ({"inference": (256,), "training": (256,)}, {"inference": (1, 64)})
    for operator in ("leff", "model", "i2t", "lca", "add_norm")
)
_QUICK_PLAN: _Plan = (
    ("leff", ("tiny",), _FLOAT32, {"inference": (4,), "training": (4,)}),
    ("i2t", ("tiny",), _FLOAT32, {"inference": (4,)}),
    ("lca", ("tiny",), _FLOAT32, {"inference": (16,)}),
    ("add_norm", ("tiny",), _FLOAT32, {"inference": (16,)}),
    ("model", ("tiny",), _FLOAT32, {"inference": (1,)}),
)


def plan(device: torch.device, *, quick: bool = False) -> list[Workload]:
    """The workloads to time on a device, the most important ones first.

    Args:
        device: where; a GPU also takes bfloat16 and larger batches, a CPU bfloat16 where it has instructions for it.
        quick: a few workloads instead, on a GPU in each of its dtypes.
    """
    on_gpu = device.type == "cuda"
    if quick:
        workloads = _workloads(_QUICK_PLAN)
        return (
            [replace(workload, dtype=dtype) for dtype in _GPU_DTYPES for workload in workloads] if on_gpu else workloads
        )
    if on_gpu:
        return _workloads(_GPU_PLAN)
    return _workloads(_CPU_PLAN + (_CPU_BFLOAT16_PLAN if has_bfloat16(device) else ()))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16: every GPU that is served, and CPUs with AVX512-BF16."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def _workloads(rows: _Plan) -> list[Workload]:
    return [
        Workload(operator, size, phase, dtype, batch)
        for operator, sizes, dtypes, batches in rows
        for dtype in dtypes
        for size in sizes
        for phase in batches
        for batch in batches[phase]
    ]
