import argparse
import collections
import copy
import datetime
import logging
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ceit import CeiT, load_checkpoint
from ceit_kernels import fuse

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def source():
    return CeiT(**SMALL)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pth"


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def training_checkpoint(source, prefix=""):
    """What the original training script saves: weights, averaged weights, optimizer, and its arguments with a path."""
    model = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    return {
        "model": model,
        "model_ema": {name: tensor + 1 for name, tensor in model.items()},
        "optimizer": torch.optim.AdamW(source.parameters()).state_dict(),
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.Path("runs"), nested=argparse.Namespace(a=[1])),
    }


def as_module(source, path):
    torch.save({f"module.{name}": tensor for name, tensor in source.state_dict().items()}, path)


def with_measures(source, path, **settings):
    """A checkpoint with what the loops of many projects keep beside the weights."""
    tallies = collections.defaultdict(list, loss=[0.5], nested=collections.defaultdict(int, a=1))
    contents = {
        "state_dict": collections.OrderedDict(source.state_dict()),
        "best": np.float64(71.5),
        "worst": np.float32(1.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "confusion": np.arange(6).reshape(2, 3),
        "history": tallies,
        "recent": collections.deque([1, 2], maxlen=2),
        "when": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone.utc),
        "day": datetime.date(2026, 1, 2),
        "took": datetime.timedelta(seconds=3),
        "folder": pathlib.Path("runs"),
        "rng": np.random.RandomState(0).get_state(),
        "settings": types.SimpleNamespace(lr=np.float64(0.1)),
        "seen": {1, 2},
    }
    torch.save(contents, path, **settings)


FORMATS = {
    "measures": with_measures,
    "measures in a legacy file": lambda source, path: with_measures(source, path, _use_new_zipfile_serialization=False),
    "a defaultdict": lambda source, path: torch.save(
        collections.defaultdict(dict, model=source.state_dict(), epoch=1), path
    ),
    "without counters": lambda source, path: torch.save(
        {name: t for name, t in source.state_dict().items() if "num_batches_tracked" not in name}, path
    ),
    "official": lambda source, path: torch.save(training_checkpoint(source), path),
    "official under DDP": lambda source, path: torch.save(training_checkpoint(source, "module."), path),
    "legacy file": lambda source, path: torch.save(
        training_checkpoint(source), path, _use_new_zipfile_serialization=False
    ),
    "windows path": lambda source, path: torch.save(
        {"model": source.state_dict(), "args": pathlib.PureWindowsPath("C:/runs")}, path
    ),
    "state_dict": lambda source, path: torch.save(source.state_dict(), path),
    "state_dict under DDP": as_module,
    "timm": lambda source, path: torch.save({"state_dict": source.state_dict(), "arch": "ceit", "epoch": 1}, path),
    "safetensors": lambda source, path: save_file(source.state_dict(), path),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_reads_every_format(kind, source, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    FORMATS[kind](source, path)
    model = CeiT(**SMALL)
    load_checkpoint(model, path)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(("name", "ema_name"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_use_ema_takes_the_averaged_weights(name, ema_name, source, path):
    averaged = {f"module.{key}": tensor + 1 for key, tensor in source.state_dict().items()}
    torch.save({name: source.state_dict(), ema_name: averaged}, path)
    model = CeiT(**SMALL)
    load_checkpoint(model, str(path), use_ema=True)
    assert torch.equal(model.head.weight, source.head.weight + 1)


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, fuse, lambda m: torch.compile(m, backend="eager"), nn.DataParallel],
    ids=["plain", "fused", "compiled", "parallel"],
)
def test_loads_into_wrapped_models(wrap, source, path):
    torch.save(training_checkpoint(source), path)
    inner = CeiT(**SMALL)
    parameters = list(inner.parameters())
    load_checkpoint(wrap(inner), path)
    assert same(inner.state_dict(), source.state_dict())
    assert all(a is b for a, b in zip(parameters, inner.parameters(), strict=True))


def test_a_file_without_counters_leaves_the_models_and_needs_all_else(source, path):
    weights = {name: t for name, t in source.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(weights, path)
    model = CeiT(**SMALL)
    model.i2t.backbone.bn.num_batches_tracked.fill_(5)
    load_checkpoint(model, path)
    assert model.i2t.backbone.bn.num_batches_tracked == 5
    del weights["i2t.backbone.bn.running_var"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"missing \(1\): i2t\.backbone\.bn\.running_var"):
        load_checkpoint(model, path)


def test_loads_into_a_model_whose_parts_are_wrapped(source, path):
    torch.save(training_checkpoint(source, "module._orig_mod."), path)
    model = CeiT(**SMALL)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    load_checkpoint(nn.DataParallel(model), path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_loads_where_state_dicts_swap_tensors(source, path):
    torch.save(training_checkpoint(source), path)
    model = fuse(CeiT(**SMALL)).eval()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        load_checkpoint(model, path)
        assert same(model.state_dict(), source.state_dict())
        model.load_state_dict({name: tensor + 1 for name, tensor in source.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert torch.equal(model.pos_embed, source.pos_embed + 1)


def test_a_model_on_the_meta_device_is_refused(source, path):
    torch.save(source.state_dict(), path)
    with torch.device("meta"):
        model = CeiT(**SMALL)
    with pytest.raises(ValueError, match="model: expected one with memory for its weights, got some on the meta"):
        load_checkpoint(model, path)
    load_checkpoint(model.to_empty(device="cpu"), path)
    assert same(model.state_dict(), source.state_dict())


def test_positions_are_resampled_to_the_models_grid_and_layer_positions_kept(source, path):
    nn.init.normal_(source.pos_layer_embed)
    torch.save(source.state_dict(), path)
    model = CeiT(**{**SMALL, "img_size": (96, 48)})
    load_checkpoint(model, path)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(source.pos_embed, [6, 3], [4, 4]))
    assert torch.equal(model.pos_layer_embed, source.pos_layer_embed)


def test_as_many_positions_as_the_model_has_are_taken_as_they_are(path):
    source, model = (CeiT(**{**SMALL, "img_size": (32, 128)}) for _ in range(2))
    torch.save(source.state_dict(), path)
    load_checkpoint(model, path)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_exclude_keeps_the_models_own_values(source, path):
    torch.save(source.state_dict(), path)
    model = CeiT(**{**SMALL, "num_classes": 9})
    head, bias = model.head.weight.clone(), model.norm.bias.clone()
    with torch.no_grad():
        source.norm.bias += 1
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"exclude: neither the model nor checkpoint .* has heads, norm.b$"):
        load_checkpoint(model, path, exclude=("heads", "head", "norm.b"))
    load_checkpoint(model, path, exclude=("head", "norm.bias"))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.bias, bias)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_lower_precision_is_converted(source, path):
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in source.state_dict().items()}, path)
    model = CeiT(**SMALL)
    load_checkpoint(model, path)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source.head.weight.half().float())


def test_what_was_loaded_is_logged(source, path, caplog):
    torch.save(source.state_dict(), path)
    with caplog.at_level(logging.INFO, logger="ceit"):
        load_checkpoint(CeiT(**SMALL), path)
    assert f"Loaded {len(source.state_dict())} tensors from {path}" in caplog.text


@pytest.mark.parametrize("wrap", [lambda m: m, fuse], ids=["plain", "fused"])
def test_a_mismatch_lists_everything_and_leaves_the_model_as_it_was(wrap, source, path):
    weights = source.state_dict()
    del weights["norm.bias"]
    weights["fc.weight"] = torch.zeros(1)
    weights["head.weight"] = torch.zeros(7, 32)
    torch.save(weights, path)
    model = wrap(CeiT(**SMALL))
    before = state_of(model)
    with pytest.raises(ValueError, match="does not match the model") as error:
        load_checkpoint(model, path)
    message = str(error.value)
    assert str(path) in message
    assert "missing (1): norm.bias" in message
    assert "unexpected (1): fc.weight" in message
    assert "wrong shape (1): head.weight: (7, 32) given, (5, 32) expected" in message
    assert "exclude=" in message
    assert same(model.state_dict(), before)


def test_a_long_list_of_mismatches_is_cut(source, path):
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing \(85\): cls_token, .* and 77 more\n  unexpected \(1\): other"):
        load_checkpoint(source, path)


def test_positions_without_a_square_grid_are_a_mismatch(source, path):
    torch.save({**source.state_dict(), "pos_embed": torch.zeros(1, 1 + 18, 32)}, path)
    with pytest.raises(ValueError, match=r"pos_embed: \(1, 19, 32\) given, \(1, 17, 32\) expected"):
        load_checkpoint(source, path)


class Attack:
    """Unpickled the ordinary way, it creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.target),)


class AttackThroughArguments(argparse.Namespace):
    def __init__(self, target):
        super().__init__()
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w')",)


class AttackThroughAFactory:
    """Among the arguments of something that a stand-in takes the place of."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return collections.defaultdict, (Attack(self.target),)


def attack_through_an_array(target):
    return np.array([Attack(target)], dtype=object)


@pytest.mark.parametrize("attack", [Attack, AttackThroughArguments, AttackThroughAFactory, attack_through_an_array])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(attack, zipped, source, path, tmp_path):
    target = tmp_path / "created"
    contents = {"model": source.state_dict(), "args": attack(target)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    before = state_of(source)
    with pytest.raises(ValueError, match=r"it asks for .*only tensors and plain containers are read") as error:
        load_checkpoint(source, path)
    assert str(path) in str(error.value)
    assert not target.exists()
    assert same(source.state_dict(), before)
    torch.load(path, weights_only=False)
    assert target.exists(), "the attack is none, so the test shows nothing"


def truncated(path):
    torch.save({"model": CeiT(**SMALL).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint at all\n"),
    "truncated": truncated,
    "truncated pickle": lambda path: path.write_bytes(pickle.dumps({"model": {"a": 1.0}}, protocol=2)[:-6]),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files_are_named(kind, suffix, source, tmp_path):
    path = tmp_path / f"broken{suffix}"
    UNREADABLE[kind](path)
    with pytest.raises(ValueError, match=r"broken\..* cannot be loaded: it is damaged or no checkpoint"):
        load_checkpoint(source, path)


@pytest.mark.parametrize(("name", "error"), [("absent.pth", FileNotFoundError), ("directory", IsADirectoryError)])
def test_a_file_that_cannot_be_opened_is_named(name, error, source, tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(error, match=name):
        load_checkpoint(source, tmp_path / name)


@pytest.mark.parametrize(
    ("contents", "use_ema", "message"),
    [
        ({"epoch": 1, "optimizer": {}}, False, "holds no state_dict under 'model' or 'state_dict'; it has: epoch, opt"),
        (
            {"model": {"a": torch.zeros(1)}},
            True,
            "holds no state_dict under 'model_ema' or 'state_dict_ema'; it has: ",
        ),
        ({}, False, "holds no state_dict"),
        ({0: torch.zeros(1)}, False, "holds no state_dict"),
        ([torch.zeros(1)], False, "holds a list, expected a dict"),
    ],
)
def test_a_file_without_weights_is_refused(contents, use_ema, message, source, path):
    torch.save(contents, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(source, path, use_ema=use_ema)


def test_another_model_is_refused(source, path):
    torch.save(source.state_dict(), path)
    with pytest.raises(TypeError, match="model: expected a CeiT or a wrapper of one, got Linear"):
        load_checkpoint(nn.Linear(2, 2), path)


def test_a_loaded_state_survives_its_source(source, path):
    torch.save(source.state_dict(), path)
    model = CeiT(**SMALL)
    load_checkpoint(model, path)
    expected = copy.deepcopy(source.state_dict())
    path.unlink()
    with torch.no_grad():
        source.head.weight.zero_()
    assert same(model.state_dict(), expected)
