"""Times workloads for `ceit bench --compare` with the packages of one checkout; started as a file.

It has nothing but the standard library, PyTorch and the public modules of both packages to go by, because the other
commit may lack all else. Standard input has one JSON list a line: ["freezes"], ["prepare", workload, frozen] or
["sample"]; each is answered by one line of JSON on standard output.
"""

import ctypes
import json
import sys
import time

import torch
from torch import nn

_SAMPLE_SECONDS, _LONG_CALL_SECONDS = 0.05, 0.2


def _module(workload):
    from ceit.layers import Attention, Image2Tokens, LCAAttention, LocallyEnhancedFeedForward
    from ceit.registry import create_model

    channels = {"tiny": 192, "small": 384}[workload["size"]]
    torch.manual_seed(0)
    if workload["operator"] == "leff":
        return LocallyEnhancedFeedForward(channels, 4 * channels), (workload["batch"], 197, channels)
    if workload["operator"] == "lca":
        return LCAAttention(channels, channels // 64, qkv_bias=True), (workload["batch"], 12, channels)
    if workload["operator"] == "attention":
        return Attention(channels, channels // 64, qkv_bias=True), (workload["batch"], 197, channels)
    if workload["operator"] == "add_norm":
        return _residual(channels), (workload["batch"], 197, channels)
    image = (workload["batch"], 3, workload["image_size"], workload["image_size"])
    if workload["operator"] == "i2t":
        return Image2Tokens(), image
    return create_model(f"ceit_{workload['size']}_patch16_224", fused=False), image


def _residual(channels):
    """The residual path of a block, as `workloads.Residual`."""
    from ceit.layers import AddNorm

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_norm = AddNorm()
            self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
            self.attention, self.feed_forward = nn.Linear(channels, channels), nn.Linear(channels, channels)

        def forward(self, x):
            x, y = self.add_norm(x, None, self.norm1)
            x, y = self.add_norm(x, self.attention(y), self.norm2)
            return x + self.feed_forward(y)

    return Residual()


def prepare(workload, frozen):
    """A function that returns the seconds of one call of the fused module, live or frozen."""
    import ceit_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, shape = _module(workload)
    training = workload["phase"] == "training"
    dtype = getattr(torch, workload["dtype"])
    prepared = ceit_kernels.freeze if frozen else ceit_kernels.fuse
    module: nn.Module = prepared(module.to(device, dtype).train(training))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def call():
        if not training:
            with torch.no_grad():
                return module(x)
        module.zero_grad(set_to_none=True)
        out = module(x)
        out.float().square().mean().backward()
        return out

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    timed(2)
    seconds = timed(1)
    repeats = max(1, round(_SAMPLE_SECONDS / seconds))

    def sample():
        if seconds < _LONG_CALL_SECONDS:
            # The other process's threads go on spinning for a while after its sample.
            timed(repeats)
        return timed(repeats)

    return sample


def freezes():
    """Whether this checkout has frozen modules."""
    import ceit_kernels

    return hasattr(ceit_kernels, "freeze")


def _keep_freed_memory():
    """As in `timing`: glibc keeps what is freed, whatever the process did before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for threshold in (-1, -3) if mallopt is not None else ():
        mallopt(threshold, 1 << 30)


def main():
    """Answer requests until standard input ends."""
    # What libraries print must not be taken for answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    _keep_freed_memory()
    sample = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            if command == "freezes":
                answer = {"freezes": freezes()}
            elif command == "prepare":
                sample, answer = prepare(*arguments), {"ready": True}
            else:
                answer = {"seconds": sample()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
