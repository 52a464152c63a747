"""What ``torch.compile`` would launch for a module on an H100, as Inductor schedules it and counts its bytes.

Inductor is told that a GPU is there; it generates code, which is not run. This reaches into Inductor, so it belongs to
the versions of PyTorch that it was tried with; ``STORED`` holds figures for where it does not work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.node import map_arg

from .counting import Call, FlashAttention, Kernel, fake_model, operator_flops

STORED_WITH = "2.14.1"
STORED_FOR = ("small", "bfloat16", 256, 224)  # size of the model, dtype, batch, side of the image
# Kernels and bytes of each operator at inference, in a training step's forward and in its backward.
_STORED = {
    "leff": ((6, 1_428_812_544), (20, 2_441_672_496), (21, 5_754_697_728)),
    "lca": ((5, 17_601_792), (5, 17_607_960), (15, 47_944_728)),
    "i2t": ((3, 1_824_017_280), (6, 2_286_479_248), (7, 4_752_735_872)),
    "add_norm": ((5, 504_107_520), (5, 504_510_976), (14, 862_161_664)),
    "model": ((139, 26_877_283_152), (329, 41_608_841_176), (500, 89_573_340_424)),
}
STORED = {
    operator: dict(zip(("inference", "training forward", "training backward"), figures, strict=True))
    for operator, figures in _STORED.items()
}

_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
_PRETENDED = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_properties": lambda *device: _H100,
    "torch.cuda.get_device_capability": lambda *device: (9, 0),
    "torch.cuda.synchronize": lambda *device: None,
    "torch.cuda._get_device_properties": lambda *device: _H100,
    "torch.cuda._lazy_init": lambda: None,
    "torch.utils._triton.triton_hash_with_backend": lambda: "",
    # Cached as False by whoever asked before.
    "torch._inductor.scheduler.has_triton": lambda *device: True,
}


class CompiledTrafficError(RuntimeError):
    """This version of PyTorch does not let its compiler's kernels be counted so."""


def count_compiled(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    input_gradient: bool = True,
) -> Call:
    """Count the kernels of ``torch.compile(module)``; arguments as of ``count_call``.

    Raises:
        CompiledTrafficError: this version of PyTorch's compiler is put together otherwise.
    """
    try:
        return _count(make, shape, dtype, training, input_gradient)
    except Exception as error:
        message = f"the kernels of torch.compile cannot be counted with torch {torch.__version__}: {error!r}"
        raise CompiledTrafficError(message) from error


def _count(
    make: Callable[[], nn.Module], shape: Sequence[int], dtype: torch.dtype, training: bool, input_gradient: bool
) -> Call:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    call = Call()

    def compiler(kernels: list[Kernel], is_backward: bool = False) -> Callable:
        def schedule(graph: GraphModule, arguments: Sequence[Any]) -> Callable:
            kernels.extend(_schedule(graph, arguments, is_backward))
            return make_boxed_func(graph)

        return schedule

    def partition(graph: GraphModule, arguments: Sequence[Any], **options: Any) -> tuple[GraphModule, GraphModule]:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, arguments, **options, compiler="inductor")

    with fake_model(make, dtype) as module, FlashAttention():
        module.train(training)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        compiled = aot_function(
            lambda state, x: torch.func.functional_call(module, state, (x,)),
            fw_compiler=compiler(call.forward),
            bw_compiler=compiler(call.backward, is_backward=True),
            inference_compiler=compiler(call.forward),
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        x = torch.empty(shape, dtype=dtype, requires_grad=training and input_gradient)
        with torch.set_grad_enabled(training):
            out = compiled(state, x)
        if training:
            out.backward(torch.empty(out.shape, dtype=out.dtype))
    return call


def _schedule(graph: GraphModule, arguments: Sequence[Any], is_backward: bool) -> list[Kernel]:
    """The kernels that Inductor makes of a traced graph on a GPU."""
    import torch._inductor.codegen.triton  # registers code generation for GPUs
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import make_fx

    on_gpu = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]
    moved = copy.deepcopy(graph.graph)
    for node in moved.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    with torch.no_grad():
        gpu_graph = make_fx(GraphModule(graph, moved), tracing_mode="real")(*on_gpu)
    fake_mode = next(a.fake_mode for a in on_gpu if isinstance(a, FakeTensor))
    lowering = GraphLowering(gpu_graph, shape_env=fake_mode.shape_env, is_backward=is_backward)
    with ExitStack() as stack:
        for name, value in _PRETENDED.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_fake_mode(fake_mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        lowering.run(*on_gpu)
        lowering.codegen()
        # Nodes without bytes stand for the single outputs of a kernel that has several.
        return [
            _kernel(node, size) for node in lowering.scheduler.nodes if (size := node.get_read_write_buffers_sizes())
        ]


def _kernel(scheduled: Any, moved_bytes: int) -> Kernel:
    """A scheduled node as a kernel: matmuls and convolutions are calls of a library, all else is generated code."""
    if not scheduled.is_extern():
        return Kernel("generated", moved_bytes, 0, fused=False)
    node = getattr(scheduled.node, "fx_node", None) or scheduled.node.get_origin_node()
    if node is None:
        return Kernel("library call", moved_bytes, 0, fused=False)
    args, kwargs, out = map_arg((node.args, node.kwargs, node), lambda value: value.meta["val"])
    return Kernel(str(node.target), moved_bytes, operator_flops(node.target, args, kwargs, out), fused=False)
