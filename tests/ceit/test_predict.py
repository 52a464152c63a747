import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch

from ceit import CeiT
from ceit.__main__ import main
from ceit.data import create_test_loader, open_split
from ceit.predict import lca_attention, predict, rendered
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.options import PredictOptions
from ceit.train import train
from ceit_kernels import fuse

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}


@pytest.fixture
def trained(options):
    settings = options(epochs=6, lr=3e-3, drop_path=0.0, label_smoothing=0.0, scale=[0.7, 1.0], ema=True)
    train(settings)
    return settings, str(Path(settings.output) / "last.pt")


def options_for(trained, **changes):
    settings, path = trained
    images = [str(Path(settings.data) / "val" / name / "0.png") for name in ("ant", "bee", "cat")]
    return PredictOptions(**{"images": images, "checkpoint": path, "device": "cpu", "topk": 2, **changes})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_images_get_the_classes_that_evaluation_gives_them(trained, fused, ema):
    from timm.data import resolve_model_data_config

    from ceit.runtime.building import restore_model

    settings, _ = trained
    found = predict(options_for(trained, images=[f"{settings.data}/val"], fused=fused, ema=ema, batch_size=5))
    model, _, classes = restore_model(options_for(trained, fused=False, ema=ema))
    config = resolve_model_data_config(model, args={"input_size": (3, 32, 32)})
    loader = create_test_loader(open_split(settings, training=False), settings, config, Place(torch.device("cpu")))
    with torch.no_grad():
        expected = torch.cat([model.eval()(images) for images, _ in loader]).softmax(1)
    assert len(found) == len(expected) == 13
    assert [p.classes[0] for p in found] == [classes[i] for i in expected.argmax(1)]
    torch.testing.assert_close(torch.tensor([p.probabilities[0] for p in found]), expected.amax(1), rtol=0, atol=1e-3)
    assert all(len(p.classes) == 2 and p.probabilities[0] >= p.probabilities[1] for p in found)


def test_predictions_are_printed_as_a_table_json_or_csv(trained, capsys):
    settings, path = trained
    image = f"{settings.data}/val/ant/0.png"
    for form in ("table", "json", "csv"):
        words = ["predict", image, "--checkpoint", path, "--device", "cpu", "--topk", "3", "--format", form]
        assert main([*words, "--amp", "bfloat16", "--crop-pct", "1.0"]) == 0
        text = capsys.readouterr().out
        if form == "json":
            (answer,) = json.loads(text)
            assert answer["image"] == image
            assert {top["class"] for top in answer["top"]} == {"ant", "bee", "cat"}
            assert sum(top["probability"] for top in answer["top"]) == pytest.approx(1)
        elif form == "csv":
            rows = list(csv.DictReader(io.StringIO(text)))
            assert [row["rank"] for row in rows] == ["1", "2", "3"]
            assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
        else:
            lines = text.splitlines()
            assert lines[0] == image
            assert len(lines) == 4
            assert all(line.endswith("%") for line in lines[1:])


def test_without_names_classes_are_numbers(trained, tmp_path):
    settings, path = trained
    torch.save(torch.load(path, weights_only=True)["model"], tmp_path / "bare.pth")
    found = predict(
        options_for(
            trained,
            checkpoint=str(tmp_path / "bare.pth"),
            model=settings.model,
            model_kwargs=settings.model_kwargs,
            img_size=32,
            topk=9,
        )
    )
    assert sorted(found[0].classes) == ["0", "1", "2"]


def test_outputs_beyond_the_named_classes_are_numbers(trained, tmp_path):
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint["classes"] = checkpoint["classes"][:2]
    checkpoint["model"]["head.bias"][2] = 1e3
    torch.save(checkpoint, tmp_path / "fewer.pt")
    found = predict(options_for(trained, checkpoint=str(tmp_path / "fewer.pt")))
    assert {prediction.classes[0] for prediction in found} == {"2"}


def test_explaining_draws_a_picture_for_each_image(trained, tmp_path):
    folder = tmp_path / "pictures" / "why"
    predict(options_for(trained, explain=str(folder), batch_size=2))
    assert sorted(os.listdir(folder)) == ["001-0.png", "002-0.png", "003-0.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


@pytest.mark.parametrize("fused", [True, False])
def test_the_attention_that_is_drawn_is_that_of_lca(fused):
    torch.manual_seed(0)
    model = CeiT(**SMALL).eval()
    model = fuse(model) if fused else model
    images = torch.randn(2, 3, 32, 32)
    found = lca_attention(model, images)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2))
    # Values of one at one layer and of zero elsewhere make the attention's output the weight of that layer.
    attention = model.lca.attn
    seen = []
    with torch.no_grad(), attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model(images)
    q, k, _ = attention.qkv(seen[0]).unflatten(2, (3, 2, -1)).unbind(2)
    for layer in range(3):
        v = torch.zeros_like(k)
        v[:, layer] = 1
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q[:, -1:], k, v)), scale=attention.scale
        )
        torch.testing.assert_close(out[:, :, 0, 0], found[:, :, layer])


UNUSABLE = [
    ({"images": []}, "IMAGE: expected at least one picture or folder"),
    ({"images": ["nowhere.png"]}, "IMAGE nowhere.png: there is no such file"),
    ({"images": ["/dev/zero"]}, "it is a pipe or a device"),
    ({"images": [__file__]}, "IMAGE .*cannot identify"),
    ({"checkpoint": None}, "--checkpoint must be given, unless --model is a folder"),
    ({"checkpoint": "nowhere.pt"}, "checkpoint nowhere.pt does not exist"),
    ({"backend": "triton", "fused": True}, "triton"),
    ({"crop_pct": 2.0}, "--crop-pct must be at most 1"),
    ({"topk": 0}, "--topk must be at least 1"),
    ({"format": "xml"}, "--format must be one of table, json, csv"),
    ({"explain": "/proc/why"}, "--explain /proc/why: "),
    ({"img_size": [32, 32, 32]}, "--img-size must be one number or two, got 3"),
]


def test_what_cannot_be_used_is_named(trained):
    for changes, message in UNUSABLE:
        with pytest.raises(UsageError, match=message):
            predict(options_for(trained, **changes))


def test_a_folder_without_pictures_is_named(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: no pictures in this folder"):
        predict(options_for(trained, images=[str(tmp_path / "empty")]))


def test_tables_align_names_of_any_length():
    from ceit.predict import Prediction

    text = rendered([Prediction("a.png", ("x", "longer"), (0.75, 0.25))], "table")
    assert text.splitlines() == ["a.png", "  x        75.00%", "  longer   25.00%"]
