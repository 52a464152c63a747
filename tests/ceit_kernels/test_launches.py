"""What is launched for CeiT on each chip: grids, tiles, warps and stages.

launches.txt has them; `PYTHONPATH=tests:. python tests/ceit_kernels/test_launches.py` writes it anew. Whatever changes
there was never timed: `make prove` looks at its machine code, `python -m benchmarks.cycles` estimates it.
"""

import itertools
import re
from pathlib import Path

import torch
from support.leff import make_shape
from torch._subclasses import FakeTensorMode

from ceit_kernels.add_norm.triton.launch import add_norm_backward_triton, add_norm_forward_triton
from ceit_kernels.attention.triton.launch import qkv_gradient_triton
from ceit_kernels.common.launch import record_launches
from ceit_kernels.lca.triton.launch import lca_backward_triton, lca_forward_triton
from ceit_kernels.leff.norms import BatchNorm
from ceit_kernels.leff.triton.launch_backward import leff_backward_triton
from ceit_kernels.leff.triton.launch_forward import leff_forward_triton
from ceit_kernels.leff.triton.launch_inference import leff_inference_triton
from ceit_kernels.leff.triton.launch_library import leff_inference_library
from ceit_kernels.leff.triton.tiles import inference_contract_tiles
from ceit_kernels.tokens.triton.launch import column_sums_triton, join_tokens_triton

FILE = Path(__file__).with_name("launches.txt")
# Of a launch's arguments those that say how the work is shared out.
SHARES = re.compile(r"(TILE|NUM|FOLD|WEIGHT)_[A-Z]|ROWS|IMAGES|GROUP|[ST]\d?")


def leff_inference(shape, dtype, backend):
    x, parameters, settings = make_shape(shape, dtype, "frozen")
    run = leff_inference_library if backend == "library" else leff_inference_triton
    run(x, parameters, x, settings._replace(backend=backend), dtype)


def leff_training(shape, dtype, backend, kernel_size=3):
    x, parameters, settings = make_shape(shape, dtype, "batch", kernel_size=kernel_size)
    settings = settings._replace(backend=backend)
    norms = [batch_norm(parameters[i + 2 : i + 6]) for i in range(0, len(parameters), 6)]
    out, *saved = leff_forward_triton(x, parameters, None, settings, dtype, norms)
    needs = [parameter is not None for i, parameter in enumerate(parameters) if i % 6 < 4]
    leff_backward_triton(out, x, parameters, saved, settings, True, needs)


def batch_norm(tensors):
    weight, bias, mean, variance = tensors
    if mean is None:
        return None
    return BatchNorm(
        mean, variance, weight, bias, training=True, num_batches_tracked=mean.new_empty((), dtype=torch.int64)
    )


def lca(channels, dtype):
    x = torch.empty(256, 12, channels, dtype=dtype, device="cuda")
    call = x, x.new_empty(3 * channels, channels), None, None, channels // 64, 0.125, 0.0, dtype
    lca_backward_triton(lca_forward_triton(*call), *call, True, True)


def add_norm(channels, dtype):
    x = torch.empty(256, 197, channels, dtype=dtype, device="cuda")
    weight = x.new_empty(channels)
    total, out, prefix, *statistics = add_norm_forward_triton(x, x, weight, weight, 1e-6, 1, True, dtype)
    add_norm_backward_triton(out, total, prefix, total, weight, weight, *statistics, True, True, True)


def attention(channels, dtype):
    grad = torch.empty(256, 197, channels // 64, 64, dtype=dtype, device="cuda")
    grad_out = grad.view(-1, channels)
    qkv_gradient_triton(grad, grad, grad, grad_out, True, dtype, dtype)


def tokens(channels, dtype):
    x = torch.empty(256, 197, channels, dtype=dtype, device="cuda")
    none, layer = [None] * 14, x[:, :1]
    join_tokens_triton(x[:1], None, x[:1, :1], x[:, 1:], *none, True, dtype)
    column_sums_triton(x, None, None, None, dtype, None, None, None, dtype, dtype)
    join_tokens_triton(x[:1, :12], layer, *[layer] * 12, *none[:4], False, dtype)
    rows = x.new_empty(256, channels), x.new_empty(256, 4 * channels), x.new_empty(256, channels)
    column_sums_triton(x[:, :12], *rows, *[dtype] * 4, None, None)


def lines():
    calls = [
        (run, (shape, torch.bfloat16, "triton"), chip)
        for run in (leff_inference, leff_training)
        for shape, chips in (
            ("small", (80, 90, 100, 120)),
            ("tiny", (90,)),
            ("Mix-FFN 14x14x320", (90, 120)),
            ("Mix-FFN 56x56x64", (90,)),
        )
        for chip in chips
    ]
    calls += [(run, ("small", torch.float32, "triton"), 90) for run in (leff_inference, leff_training)]
    calls += [(run, ("base", torch.bfloat16, "library"), 90) for run in (leff_inference, leff_training)]
    calls += [(leff_training, ("tiny", torch.bfloat16, "library", kernel_size), 90) for kernel_size in (5, 7)]
    calls += [(run, (channels, dtype), 90) for run in (lca, add_norm, attention, tokens) for channels, dtype in WIDTHS]
    for channels, chip in itertools.product((8, 40, 96, 128, 256, 512), (80, 100)):
        tiles = inference_contract_tiles(channels, torch.bfloat16, chip, has_residual=False).sizes
        words = [f"{name}={size}" for name, size in tiles.items()]
        yield f"{channels} outputs of inference, cc {chip}: {' '.join(words)}"
    for run, arguments, chip in calls:
        yield f"{run.__name__}: {', '.join(map(str, arguments))}, cc {chip}"
        with FakeTensorMode(), record_launches(chip) as launches:
            run(*arguments)
        for launch in launches:
            shares = {name: number for name, number in launch.arguments.items() if SHARES.fullmatch(name)}
            words = [f"{name}={number}" for name, number in sorted(shares.items())]
            compiled = f"{launch.num_warps} warps, {launch.num_stages} stages, {launch.registers} registers"
            yield f"  {launch.kernel.__name__} {'x'.join(map(str, launch.grid))}, {compiled}: {' '.join(words)}"


WIDTHS = (192, torch.bfloat16), (384, torch.bfloat16), (384, torch.float64), (3072, torch.float32)


def test_launches_are_those_that_were_looked_at():
    assert "\n".join(lines()) + "\n" == FILE.read_text()


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
