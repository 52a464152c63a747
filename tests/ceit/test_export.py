import json
import os
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import ceit
from ceit import export as exporting
from ceit.__main__ import main
from ceit.evaluate import evaluate_checkpoint
from ceit.export import ExportFailed, _difference, export
from ceit.predict import predict
from ceit.runtime.building import restore_model
from ceit.runtime.errors import UsageError
from ceit.runtime.options import EvaluateOptions, ExportOptions, PredictOptions
from ceit.train import train

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


@pytest.fixture
def trained(options):
    settings = options(epochs=1, img_size=[32, 48], ema=True)
    train(settings)
    return settings, f"{settings.output}/last.pt"


def options_for(trained, tmp_path, *formats, **changes):
    return ExportOptions(
        **{"checkpoint": trained[1], "format": list(formats), "output": str(tmp_path / "out"), **changes}
    )


def outputs(trained, images, **changes):
    model, *_ = restore_model(ExportOptions(checkpoint=trained[1], **changes))
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.usefixtures("openvino_with_all_instructions")
@pytest.mark.parametrize(
    ("name", "ema"),
    [("safetensors", False), *((name, True) for name in ("pt2", "onnx", "openvino", "safetensors", "hub"))],
)
def test_exported_models_give_the_models_outputs_for_any_batch(name, ema, trained, tmp_path):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    (path,) = export(options_for(trained, tmp_path, name, ema=ema))
    images = torch.randn(5, 3, 32, 48)
    expected = outputs(trained, images, ema=ema)
    if name == "pt2":
        found = torch.export.load(path).module()(images)
    elif name == "onnx":
        import onnxruntime

        found = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
    elif name == "openvino":
        import openvino

        found = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0]
    elif name == "hub":
        found = ceit.create_model(str(path)).eval()(images)
    else:
        settings = trained[0]
        model = ceit.create_model(
            settings.model, checkpoint=path, num_classes=3, img_size=(32, 48), **settings.model_kwargs
        )
        found = model.eval()(images)
    torch.testing.assert_close(torch.as_tensor(found).detach(), expected, rtol=1e-4, atol=1e-4)
    assert [n for n in os.listdir(tmp_path / "out") if n.endswith(".partial")] == []


def test_a_hub_folder_is_a_model_for_ceit_timm_and_every_command(trained, tmp_path, capsys):
    (folder,) = export(options_for(trained, tmp_path, "hub"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("ceit_tiny_patch16_224", 3)
    assert config["label_names"] == ["ant", "bee", "cat"]
    weights = load_file(folder / "model.safetensors")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    if hasattr(timm.models, "resolve_model_input_args"):  # earlier versions of timm refuse another number of classes
        assert ceit.create_model(folder, num_classes=7).head.out_features == 7

    data, folder = trained[0].data, str(folder)
    by_file = evaluate_checkpoint(EvaluateOptions(data=data, checkpoint=trained[1], workers=0, device="cpu"))
    assert evaluate_checkpoint(EvaluateOptions(data=data, model=folder, workers=0, device="cpu")).top1 == by_file.top1
    assert (
        predict(PredictOptions(images=[f"{data}/val"], model=folder, device="cpu"))[0].classes[0]
        in config["label_names"]
    )
    assert export(ExportOptions(model=folder, output=str(tmp_path / "again"), format=["safetensors"]))
    words = ["train", "--data", data, "--model", folder, "--epochs", "1", "--batch-size", "8", "--workers", "0"]
    assert main([*words, "--device", "cpu", "--output", str(tmp_path / "tuned")]) == 0


def test_several_formats_at_once_and_what_was_there_is_replaced(trained, tmp_path, capsys):
    words = ["export", "--checkpoint", trained[1], "--output", str(tmp_path / "out"), "--format"]
    for _ in range(2):
        assert main([*words, "hub", "safetensors"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            str(tmp_path / "out" / "hub"),
            str(tmp_path / "out" / "model.safetensors"),
        ]


def test_the_weights_of_another_project_export(trained, tmp_path):
    torch.save(torch.load(trained[1], weights_only=True)["model"], tmp_path / "official.pth")
    settings = trained[0]
    described = {"model": settings.model, "model_kwargs": settings.model_kwargs, "img_size": [32, 48]}
    options = options_for(trained, tmp_path, "safetensors", checkpoint=str(tmp_path / "official.pth"), **described)
    assert export(options)[0].is_file()


def test_fused_operators_stay_in_pt2_where_asked(trained, tmp_path):
    (plain,) = export(options_for(trained, tmp_path, "pt2"))
    assert "ceit" not in str(torch.export.load(plain).graph)
    (fused,) = export(options_for(trained, tmp_path, "pt2", fused=True))
    assert "ceit" in str(torch.export.load(fused).graph)
    with pytest.raises(UsageError, match="--fused: only pt2 can hold fused operators"):
        export(options_for(trained, tmp_path, "onnx", fused=True))


def test_what_differs_from_the_model_is_not_kept(trained, tmp_path, monkeypatch, capsys):
    write, load = exporting._FORMATS["safetensors"]

    def load_wrong(path, source):
        function = load(path, source)
        return lambda images: function(images) + 2e-4 * 10

    monkeypatch.setitem(exporting._FORMATS, "safetensors", (write, load_wrong))
    with pytest.raises(
        ExportFailed, match=r"safetensors: outputs differ from the model's by 0\.00.*, expected 0\.0001"
    ):
        export(options_for(trained, tmp_path, "safetensors"))
    assert os.listdir(tmp_path / "out") == [".lock"]
    words = ["export", "--checkpoint", trained[1], "--output", str(tmp_path / "out"), "--format", "safetensors"]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: safetensors: outputs differ")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_missing_package_is_named_with_the_extra(name, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"--format {name} needs {name}: pip install 'ceit-kernels\[export\]'"):
        export(options_for(trained, tmp_path, name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architecture": "resnet18"}', "holds a resnet18, expected one of ceit_tiny_patch16_224"),
        ("{", "does not say which model it is of"),
        ("[]", "does not say which model it is of"),
    ],
)
def test_folders_of_other_models_are_named(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ceit.create_model(tmp_path)


def test_outputs_are_compared_relative_to_the_largest_above_one():
    for found, expected, difference in (
        ([0.5, 0.1], [0.5, 0.3], 0.2),
        ([3.0, 2.0], [4.0, 2.0], 0.25),
        ([1.0], [1.5], 1 / 3),
    ):
        assert _difference(found, torch.tensor(expected)) == pytest.approx(difference)
    assert _difference([1.0], torch.ones(2)) == float("inf")
