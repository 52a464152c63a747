"""``python -m ceit_kernels try``."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2

from ceit_kernels.__main__ import main
from ceit_kernels.leff.fusion import BlockFusion
from ceit_kernels.trial import Checked, _first_tensor, _peak_bytes, _relative, _times, image_size_of, make_model

SMALL = ["--size", "32", "--repeats", "1", "--no-compile"]


def tiny():
    sizes = {"embed_dims": (8, 12), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (2, 1), "num_classes": 5}
    return PyramidVisionTransformerV2(**sizes, mlp_ratios=(4, 2), drop_rate=0.5, drop_path_rate=0.5)


def test_try_explains_checks_and_times_a_model(capsys):
    assert main(["try", f"{__name__}:tiny", *SMALL]) == 0
    explained, checked, timed = capsys.readouterr().out.split("\n\n")
    assert "MlpWithDepthwiseConv leff native" in " ".join(explained.split())
    assert [line.split()[-1] for line in checked.splitlines()[1:]] == ["ok"] * 6
    rows = {line.split()[0]: line for line in timed.splitlines()[1:]}
    assert list(rows) == ["plain", "fused", "frozen"]
    assert rows["plain"].endswith("0.0e+00")
    assert all(row.count(" ms") == row.count(" MB") == (1 if name == "frozen" else 2) for name, row in rows.items())


def test_try_fails_if_a_result_is_wrong(capsys, monkeypatch):
    right = BlockFusion._by_operator
    monkeypatch.setattr(BlockFusion, "_by_operator", lambda *arguments: right(*arguments) * 1.001)
    assert main(["try", f"{__name__}:tiny", *SMALL]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "MODEL: 'no_such_model' cannot be made: Unknown model"),
        (["hf:no_such_type"], "MODEL: 'hf:no_such_type' cannot be made: Unrecognized model identifier"),
        (["no_such_module:make"], "MODEL: 'no_such_module:make' cannot be made: No module named"),
        (["json:dumps"], "MODEL: 'json:dumps' cannot be made: dumps() missing 1 required"),
        (["platform:machine"], "MODEL: expected 'platform:machine' to give a torch.nn.Module, got str"),
        (["pvt_v2_b0", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["pvt_v2_b0", "--device", "abacus"], "--device: 'abacus' cannot be used"),
    ],
)
def test_try_says_what_is_wrong_with_its_arguments(arguments, message, capsys):
    assert main(["try", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_images_have_the_size_that_the_model_is_made_for():
    with torch.device("meta"):
        assert image_size_of(make_model("pvt_v2_b0")) == 224
        assert image_size_of(make_model("hf:segformer")) == 224
    assert image_size_of(torch.nn.Identity()) == 224
    assert image_size_of(SimpleNamespace(pretrained_cfg={"input_size": (3, 64, 96)})) == 96
    for size in (48, (32, 48)):
        assert image_size_of(SimpleNamespace(config=SimpleNamespace(image_size=size))) == 48


def test_the_memory_of_a_call_is_what_it_has_at_once():
    numbers = 1 << 18
    peak = _peak_bytes(lambda: (torch.ones(numbers) + torch.ones(numbers)).sqrt(), torch.zeros(1))
    assert 3 << 20 <= peak < 4 << 20


def test_the_memory_of_a_call_on_a_gpu_is_that_beyond_what_was_there(monkeypatch):
    told, bytes_now = [], [100]
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: told.append(name))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: bytes_now[0])

    def call():
        told.append("call")
        bytes_now[0] = 350

    assert _peak_bytes(call, SimpleNamespace(is_cuda=True, device="cuda:0")) == 250
    assert told == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]


def test_times_are_medians_in_milliseconds_behind_a_first_call(monkeypatch):
    now, seconds = [0.0], {"one": iter([9, 1, 4, 2]), "other": iter([9, 7, 5, 6])}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(name):
        now[0] += next(seconds[name])

    found = _times({name: partial(call, name) for name in seconds}, 3, torch.zeros(1))
    assert found == {"one": 2000.0, "other": 6000.0}
    assert not [*seconds["one"], *seconds["other"]]


def test_differences_are_relative_to_the_largest_number_of_all():
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    assert _relative(expected, expected) == 0
    assert _relative([expected[0], torch.tensor([1.0])], expected) == 0.25
    assert _relative([torch.tensor([1.0, -6.0]), expected[1]], expected) == 0.5
    assert Checked("output", 1e-9, 1e-9).passed
    assert not Checked("output", 1.1e-9, 1e-9).passed


def test_the_output_is_the_first_tensor_of_whatever_a_model_returns():
    x = torch.zeros(1)
    for out in (x, (x, 1), [(x,)], {"logits": x}, SimpleNamespace(to_tuple=lambda: (x, 2))):
        assert _first_tensor(out) is x
