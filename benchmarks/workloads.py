"""The workloads that are timed and counted: the only place that names the benchmarked operators, models and sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ceit import layers
from ceit.registry import create_model

from . import libraries

SIZES = {"tiny": 192, "small": 384, "base": 768}  # channels of CeiT-T, S and B
PHASES = ("inference", "training")
_HEAD_DIM, _LAYERS, _PATCH = 64, 12, 16


class Residual(nn.Module):
    """The residual path of a block, with a linear layer in the place of attention and of LeFF.

    Without these `torch.compile` would fuse one norm into the next, which no block allows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_norm = layers.AddNorm()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention, self.feed_forward = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        x, y = self.add_norm(x, None, self.norm1)
        x, y = self.add_norm(x, self.attention(y), self.norm2)
        return x + self.feed_forward(y)


# Looked up when they are made: `--compare` makes them of another commit, which may lack some.
_OPERATORS: dict[str, Callable[[int], nn.Module]] = {
    "leff": lambda channels: layers.LocallyEnhancedFeedForward(channels, 4 * channels),
    "i2t": lambda channels: layers.Image2Tokens(),
    "lca": lambda channels: layers.LCAAttention(channels, channels // _HEAD_DIM, qkv_bias=True),
    "attention": lambda channels: layers.Attention(channels, channels // _HEAD_DIM, qkv_bias=True),
    "add_norm": Residual,
}
OPERATORS = (*_OPERATORS, "model")
OTHERS = "others"  # the models of other libraries


@dataclass(frozen=True)
class Workload:
    """What is computed: an operator or a model at one size, phase, dtype and batch.

    Attributes:
        operator: one of `OPERATORS`; "model" is a whole CeiT. Or `OTHERS`.
        size: one of `SIZES`; of another library's model its name in `libraries.MODELS`.
        phase: "inference" or "training", which is forward and backward without an optimizer.
        dtype: "float32", "bfloat16" or "float16", of parameters and activations.
        batch: images.
        image_size: side in pixels, a multiple of 16.
        depth: blocks of a model; None for its own.
        axis: "batch", "image_size" or "depth" for a point of the scaling curve along it.
    """

    operator: str
    size: str
    phase: str
    dtype: str
    batch: int
    image_size: int = 224
    depth: int | None = None
    axis: str = ""

    @property
    def name(self) -> str:
        """The workload's name, as `--only` takes it."""
        point = f"-{self.axis}{getattr(self, self.axis)}" if self.axis else f"-b{self.batch}"
        size = f"{self.size}-{self.image_size}" if self.operator == OTHERS else self.size
        return f"{'scaling-' if self.axis else ''}{self.operator}-{size}-{self.phase}-{self.dtype}{point}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch has it."""
        return getattr(torch, self.dtype)

    @property
    def training(self) -> bool:
        """Whether the phase is training."""
        return self.phase == "training"

    @property
    def tokens(self) -> int:
        """Tokens of an image; for LCA those of all layers."""
        return _LAYERS if self.operator == "lca" else 1 + (self.image_size // _PATCH) ** 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input: images (B, 3, H, W) for a model and the stem, tokens (B, N, C) for the others."""
        if self.is_model or self.operator == "i2t":
            return self.batch, 3, self.image_size, self.image_size
        return self.batch, self.tokens, SIZES[self.size]

    @property
    def is_model(self) -> bool:
        """Whether it is a whole model, CeiT or another library's."""
        return self.operator in ("model", OTHERS)

    @property
    def input_gradient(self) -> bool:
        """Whether training computes the gradient of the input: images need none."""
        return self.training and len(self.shape) == 3

    @property
    def served(self) -> bool:
        """Whether it is measured frozen too: inference of what is served as it is."""
        return not self.training and (self.is_model or self.operator == "leff")

    def make_module(self) -> nn.Module:
        """The plain module on the CPU in float32, the same one in every process, in the phase's mode."""
        torch.manual_seed(0)
        if self.operator == "model":
            depth = {} if self.depth is None else {"depth": self.depth}
            module = create_model(f"ceit_{self.size}_patch16_224", fused=False, img_size=self.image_size, **depth)
        elif self.operator == OTHERS:
            module = libraries.MODELS[self.size]()
            libraries.randomize(module)
        else:
            module = _OPERATORS[self.operator](SIZES[self.size])
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            # Fresh statistics are those of no norm at all, which would hide a wrong folding.
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        module.train(self.training)  # whose result is None in TinyViT
        return module

    def make_inputs(self, count: int, device: torch.device) -> list[Tensor]:
        """`count` inputs on a device, the same in every process."""
        generator = torch.Generator().manual_seed(1)
        inputs = (torch.randn(self.shape, generator=generator) for _ in range(count))
        return [x.to(device, self.torch_dtype).requires_grad_(self.input_gradient) for x in inputs]


# Operator, sizes and batches by phase, in the order of importance: what comes last is left out when time is up.
_Plan = tuple[tuple[str, Sequence[str], dict[str, Sequence[int]]], ...]
_BOTH = "tiny", "small"
_CPU_PLAN: _Plan = (
    ("leff", _BOTH, {"inference": (16,), "training": (16,)}),
    ("model", ("tiny",), {"inference": (1, 4, 16), "training": (8,)}),
    ("i2t", ("tiny",), {"inference": (16,), "training": (8,)}),
    ("attention", ("tiny",), {"inference": (16,), "training": (8,)}),
    ("lca", ("tiny",), {"inference": (16,), "training": (16,)}),
    ("add_norm", ("tiny",), {"inference": (16,), "training": (16,)}),
    ("model", ("small",), {"inference": (1,), "training": (8,)}),
    ("model", ("small",), {"inference": (16,)}),
    ("leff", _BOTH, {"inference": (1,)}),
    ("i2t", ("tiny",), {"inference": (1,)}),
    ("lca", ("small",), {"inference": (16,), "training": (16,)}),
    ("add_norm", ("small",), {"inference": (16,), "training": (16,)}),
)
_CPU_BFLOAT16_PLAN: _Plan = (("model", _BOTH, {"inference": (1, 16)}),)
_GPU_PLAN: _Plan = tuple(
    (operator, ("tiny",) if operator == "i2t" else _BOTH, batches)
    for batches in ({"inference": (256,), "training": (256,)}, {"inference": (1, 64)})
    for operator in ("leff", "model", "i2t", "lca", "add_norm")
)
_QUICK_PLAN: _Plan = (
    ("leff", ("tiny",), {"inference": (4,), "training": (4,)}),
    ("i2t", ("tiny",), {"inference": (4,)}),
    ("lca", ("tiny",), {"inference": (16,)}),
    ("add_norm", ("tiny",), {"inference": (16,)}),
    ("model", ("tiny",), {"inference": (1,)}),
)
_SCALING = {"batch": (1, 2, 4, 8), "image_size": (128, 192, 256, 320), "depth": (3, 6, 9, 12)}
_GPU_BATCHES = (1, 4, 16, 64, 256)


def plan(device: torch.device, *, quick: bool = False) -> list[Workload]:
    """The workloads to time on a device, the most important ones first.

    Args:
        device: where; a GPU also takes bfloat16 and larger batches, a CPU bfloat16 where it has instructions for it.
        quick: a few workloads instead, on a GPU in each of its dtypes.
    """
    if device.type == "cuda":
        rows = _QUICK_PLAN if quick else _GPU_PLAN
        return [*_workloads(rows, "bfloat16"), *_workloads(rows, "float32")]
    workloads = _workloads(_QUICK_PLAN if quick else _CPU_PLAN, "float32")
    return workloads + (_workloads(_CPU_BFLOAT16_PLAN, "bfloat16") if not quick and has_bfloat16(device) else [])


def others_plan() -> list[Workload]:
    """Models of other libraries at inference, one image and eight, and training of SegFormer-B0."""
    inference = [
        Workload(OTHERS, name, "inference", "float32", batch, libraries.image_size(name))
        for name in libraries.MODELS
        for batch in (1, 8)
    ]
    trained = [name for name in libraries.MODELS if name == "segformer_b0"]
    return inference + [
        Workload(OTHERS, name, "training", "float32", 4, side) for name in trained for side in (256, 512)
    ]


def scaling_plan(device: torch.device) -> list[Workload]:
    """CeiT-T in float32 along the batch, the image's side and the depth, the latter two at batch 2."""
    axes = {**_SCALING, "batch": _GPU_BATCHES} if device.type == "cuda" else _SCALING
    return [
        replace(Workload("model", "tiny", phase, "float32", 2, axis=axis), **{axis: size})
        for axis, sizes in axes.items()
        for phase in PHASES
        for size in sizes
    ]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16: every GPU that is served, and CPUs with AVX512-BF16."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def _workloads(rows: _Plan, dtype: str) -> list[Workload]:
    return [
        Workload(operator, size, phase, dtype, batch)
        for operator, sizes, batches in rows
        for size in sizes
        for phase in batches
        for batch in batches[phase]
    ]
