"""Plain modules exported to OpenVINO and to ONNX Runtime, which are installed with the extra `bench`."""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx")}


def missing_packages(implementation: str) -> list[str]:
    """Packages that an implementation needs and that are not installed."""
    return [name for name in _PACKAGES[implementation] if importlib.util.find_spec(name) is None]


def to_openvino(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
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


def to_onnxruntime(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
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
SPINNING = {"openvino": 0.0, "onnxruntime": 0.04}
EXPORTERS = {"openvino": to_openvino, "onnxruntime": to_onnxruntime}
