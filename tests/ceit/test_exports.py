"""The model in other formats, of any batch size: torch.export, torch.compile, TorchScript, ONNX and OpenVINO."""

import pytest
import torch
from torch.export import Dim

from ceit import CeiT
from ceit_kernels import fuse

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


# Plain models are exported by the command too (test_export.py).
fused_alone = pytest.mark.parametrize("make_model", [pytest.param(False, marks=pytest.mark.prove), True], indirect=True)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def make_model(request):
    def make(**options):
        torch.manual_seed(0)
        model = CeiT(**{**SMALL, **options}).eval()
        return fuse(model) if request.param else model

    return make


@pytest.fixture
def model(make_model):
    return make_model()


def images(batch, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def check(function, model, *sizes):
    """A function of images gives what the model gives, for batches of other sizes than the example's two."""
    with torch.no_grad():
        for batch in (1, 2, 5):
            expected = model(images(batch, *sizes))
            found = torch.as_tensor(function(images(batch, *sizes)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strict", "gradients"), [(False, True), (True, False)])
def test_torch_export(model, strict, gradients):
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: Dim("b")},), strict=strict)
    check(exported.module(), model)


@torch.no_grad()
def test_torch_export_of_images_of_any_size(make_model):
    model = make_model(dynamic_img_size=True)
    shapes = ({0: Dim("b"), 2: Dim.AUTO, 3: Dim.AUTO},)
    exported = torch.export.export(model, (images(2),), dynamic_shapes=shapes)
    check(exported.module(), model, 48, 80)


@pytest.mark.prove
def test_torch_compile_of_any_batch():
    model = fuse(CeiT(**{**SMALL, "depth": 1}).eval())
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    check(compiled, model)
    model.train()
    for batch in (2, 5):
        model.zero_grad()
        compiled(images(batch)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [False, True])
def test_torchscript_by_tracing(model, gradients):
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, images(2))  # compares with a second trace, without gradients
    check(traced, model)


@fused_alone
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [pytest.param(False, marks=pytest.mark.prove), True])
def test_onnx(model, dynamo, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    if dynamo:
        pytest.importorskip("onnxscript")
        settings = {"dynamic_shapes": ({0: Dim("b")},), "verbose": False}
    else:
        settings = {"dynamic_axes": {"x": {0: "b"}}}
    torch.onnx.export(model, (images(2),), path, dynamo=dynamo, input_names=["x"], **settings)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check(lambda x: session.run(None, {"x": x.numpy()})[0], model)


@fused_alone
@pytest.mark.usefixtures("openvino_with_all_instructions")
@pytest.mark.filterwarnings("ignore")
def test_openvino(model):
    openvino = pytest.importorskip("openvino")
    converted = openvino.convert_model(model, example_input=images(2))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(lambda x: compiled(x.numpy())[0], model)
