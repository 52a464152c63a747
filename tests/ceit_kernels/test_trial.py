"""``python -m ceit_kernels try``."""

import pytest
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2

from ceit_kernels.__main__ import main
from ceit_kernels.leff.fusion import BlockFusion
from ceit_kernels.trial import _peak_bytes, image_size_of, make_model

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


def test_the_memory_of_a_call_is_what_it_has_at_once():
    numbers = 1 << 18
    peak = _peak_bytes(lambda: (torch.ones(numbers) + torch.ones(numbers)).sqrt(), torch.zeros(1))
    assert 3 << 20 <= peak < 4 << 20
