"""The implementations: plain PyTorch, what it gives for free, the hand rewrite, other runtimes, fused and frozen."""

import copy
import importlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ceit_kernels

from ..workloads import OTHERS, Workload
from .instructions import UNLIMITED, exceeding

IMPLEMENTATIONS = {
    "plain": "plain PyTorch as shipped",
    "channels-last": "plain PyTorch, images and weights of convolutions in channels-last memory",
    "compile": "torch.compile of plain, default settings",
    "compile-freezing": "torch.compile of plain with freezing, which folds the norms",
    "compile-reduce-overhead": "torch.compile of plain with CUDA graphs of its own",
    "compile-max-autotune": "torch.compile of plain, max-autotune; graphs are the timer's",
    "rewrite": "by hand: linear layers over tokens, folded norms, channels-last depthwise convolution",
    "mlp": "floor: a GELU MLP of equal width in place of LeFF; computes something else, so it is not checked",
    "openvino": "plain, converted to OpenVINO",
    "onnxruntime": "plain, exported to ONNX Runtime",
    "zentorch": "torch.compile of plain by AMD's backend, with freezing; where it is installed",
    "fused": "the fused operators of this project, live: they prepare the present weights in every call",
    "frozen": "the fused operators in a frozen snapshot, which prepared its own copies of the weights once",
}
OURS = ("fused", "frozen")
_REDUCE_OVERHEAD = "compile-reduce-overhead"
FLOOR = "mlp"
# Left out first when time is short: each costs as much compilation as the default does.
COSTLY = ("compile-freezing", "compile-reduce-overhead", "compile-max-autotune")


class ImplementationError(RuntimeError):
    """An implementation could not be built or run; the message says why in one line."""


@dataclass
class Step:
    """One call of an implementation: inference, or forward and backward.

    Attributes:
        run: takes the input, returns the output; in training the gradients are then those of the call.
        module: the PyTorch module behind it, None for another runtime.
        spinning: seconds for which its threads go on spinning after a call, longer than those of PyTorch.
        has_graphs: whether it replays CUDA graphs of its own.
    """

    run: Callable[[Tensor], Tensor]
    module: nn.Module | None
    spinning: float = 0.0
    has_graphs: bool = False

    def forget_gradients(self, x: Tensor) -> None:
        """Free the gradients of the last training call."""
        if self.module is not None:
            self.module.zero_grad(set_to_none=True)
        x.grad = None

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Gradients of the last training call by the parameter's name, and of its input `x`."""
        named = dict(self.module.named_parameters()) if self.module is not None else {}
        grads = {name.removeprefix("_orig_mod."): p.grad for name, p in named.items() if p.grad is not None}
        return grads if x.grad is None else {**grads, "input": x.grad}


# Other runtimes and compilers. The extra `bench` installs all but zentorch, which is for AMD's processors and for one
# version of PyTorch.
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx"), "zentorch": ("zentorch",)}


def missing_packages(implementation: str) -> list[str]:
    """Packages that an implementation needs and that are not installed."""
    return [name for name in PACKAGES[implementation] if importlib.util.find_spec(name) is None]


def absence(implementation: str, workload: Workload, device: torch.device) -> str | None:
    """Why an implementation does not take part in a workload on a device, None if it does."""
    operator, on_cpu = workload.operator, device.type == "cpu"
    if implementation in PACKAGES:
        if not on_cpu:
            return "taken for the CPU only"
        if workload.training:
            return "it does not train"
        if workload.dtype != "float32" and implementation in _EXPORTERS:
            return "taken in float32 only"
        if implementation in UNLIMITED and (reason := exceeding()):
            return reason
        missing = missing_packages(implementation)
        source = "'.[bench]'" if implementation in _EXPORTERS else implementation
        return f"not installed: {', '.join(missing)} (pip install {source})" if missing else None
    if implementation == "compile-freezing" and workload.training:
        return "freezing is for inference"
    if implementation == _REDUCE_OVERHEAD and on_cpu:
        return "CUDA graphs need a GPU"
    if implementation == "frozen" and not workload.served:
        return "taken for inference of LeFF and of whole models only"
    if implementation == "compile-max-autotune" and on_cpu and workload.is_model:
        return "on the CPU taken for operators only: for a model it tunes for minutes"
    if implementation in ("channels-last", "rewrite") and operator in ("lca", "attention", "add_norm"):
        return "the plain operator has no convolution and no foldable norm"
    if implementation in ("rewrite", FLOOR) and operator == OTHERS:
        return "there is nothing of CeiT in it"
    if implementation == FLOOR and operator not in ("leff", "model"):
        return "there is no feed-forward layer in it"
    return None


def build(implementation: str, workload: Workload, module: nn.Module, x: Tensor) -> Step:
    """Make an implementation ready to be called.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        workload: what it takes part in.
        module: the plain module on its device, which stays as it is.
        x: an input.

    Raises:
        ImplementationError: it cannot be built or run; the message says why.
    """
    try:
        step = _build(implementation, workload, copy.deepcopy(module), x)
        # Compilers work at the first call.
        with redirect_stdout(io.StringIO()):
            step.run(x)
    except Exception as error:
        raise ImplementationError(first_line(error)) from error
    return step


def first_line(error: Exception) -> str:
    """An error in one line: its class and the beginning of its message."""
    if isinstance(error, ImplementationError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _zentorch(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """AMD's backend of torch.compile, which leaves its passes in the settings of PyTorch's own."""
    with torch._inductor.config.patch(freezing=True, joint_custom_post_pass=None):
        return importlib.import_module("zentorch").zentorch_compile(graph, inputs)


_COMPILE: dict[str, dict] = {
    "compile": {},
    "compile-freezing": {"options": {"freezing": True}},
    _REDUCE_OVERHEAD: {"mode": "reduce-overhead"},
    "compile-max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "zentorch": {"backend": _zentorch},
}


def _to_openvino(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of the input on OpenVINO's CPU device, in float32 with PyTorch's number of threads."""
    import openvino

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The check compares names of nodes, which differ between two traces of a model that is reused.
        traced = torch.jit.trace(module, x, check_trace=False)
        converted = openvino.convert_model(traced, example_input=x, input=list(x.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def _to_onnxruntime(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of the input on ONNX Runtime's CPU provider with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder, "module.onnx"))
        torch.onnx.export(module, (x,), path, dynamo=False, input_names=["x"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# Measured. Without spinning ONNX Runtime would take up to a quarter longer.
_SPINNING = {"openvino": 0.0, "onnxruntime": 0.04}
_EXPORTERS = {"openvino": _to_openvino, "onnxruntime": _to_onnxruntime}


def _build(implementation: str, workload: Workload, module: nn.Module, x: Tensor) -> Step:
    if implementation in _EXPORTERS:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return Step(_EXPORTERS[implementation](module, x), None, _SPINNING[implementation])
    if implementation == "fused":
        module = ceit_kernels.fuse(module)
    elif implementation == "frozen":
        module = ceit_kernels.freeze(module)
    elif implementation in ("rewrite", FLOOR):
        from . import rewrite

        module = rewrite.rewrite(module, rewrite.MLP if implementation == FLOOR else rewrite.REWRITTEN)
    elif implementation == "channels-last":
        module = module.to(memory_format=torch.channels_last)
        if x.ndim == 4:
            module.register_forward_pre_hook(lambda _, x: x[0].contiguous(memory_format=torch.channels_last))
    elif implementation in _COMPILE:
        # Code compiled for earlier workloads would count towards the limit of recompilations.
        torch.compiler.reset()
        module = torch.compile(module, dynamic=False, **_COMPILE[implementation])
    run = _training(module) if workload.training else torch.no_grad()(module.__call__)
    return Step(run, module, has_graphs=implementation == _REDUCE_OVERHEAD)


def _training(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function of the input that leaves its gradients, by an output's gradient that is always the same."""
    gradient: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(x)
        if not gradient:
            generator = torch.Generator().manual_seed(2)
            gradient.append(torch.randn(out.shape, generator=generator).to(out.device, out.dtype))
        out.backward(gradient[0])
        return out.detach()

    return run
