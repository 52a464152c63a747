import argparse
import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from ceit import train as training
from ceit.__main__ import build_parser, main
from ceit.demo import DemoOptions
from ceit.runtime.fields import flag
from ceit.runtime.options import EvaluateOptions, TrainOptions


@pytest.fixture
def train_arguments(options, arguments_of):
    return arguments_of(options())


def parser_of(command):
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


@pytest.mark.parametrize(
    ("command", "options"), [("train", TrainOptions), ("evaluate", EvaluateOptions), ("demo", DemoOptions)]
)
def test_help_explains_every_option_and_shows_its_default(command, options, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(options):
        assert field.metadata["help"].split()[0] in text.split(f" {flag(field.name)}", 1)[1]
        action = next(a for a in parser_of(command)._actions if flag(field.name) in a.option_strings)
        assert len(action.help) > 5
        default = field.default_factory()
        if default is not None and default not in ({}, []):
            assert "(default: " in action.help
        else:
            assert "(default: " not in action.help


def test_parsed_options_are_those_of_the_dataclass(options, arguments_of):
    settings = options(scale=[0.5, 1.0], exclude=["head"], ema=True, hflip=0.2)
    given = vars(build_parser().parse_args(arguments_of(settings)))
    assert TrainOptions(**{k: v for k, v in given.items() if k not in ("command", "options")}) == settings


@pytest.mark.parametrize(("given", "fused"), [([], "auto"), (["--fused"], True), (["--no-fused"], False)])
def test_fusing_is_automatic_unless_said(given, fused):
    assert build_parser().parse_args(["train", "--data", "digits", *given]).fused == fused


def test_training_then_evaluating(train_arguments, options, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="ceit"):
        assert main(train_arguments) == 0
    assert f"everything is in {options().output}" in caplog.messages[-1]
    path = f"{options().output}/best.pt"
    assert main(["evaluate", "--data", options().data, "--checkpoint", path, "--device", "cpu", "--workers", "0"]) == 0
    assert "13 images" in capsys.readouterr().out


def test_progress_shows_loss_accuracy_and_speed_and_each_epoch_is_logged(train_arguments, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="ceit"):
        main(train_arguments)
    bar = capsys.readouterr().err
    assert "images/s" in bar
    assert "loss " in bar
    assert "accuracy " in bar
    assert sum("test loss" in message for message in caplog.messages) == 2
    result = json.loads((Path(train_arguments[train_arguments.index("--output") + 1]) / "result.json").read_text())
    size, first, second, end = caplog.messages
    assert size == f"ceit_tiny_patch16_224: {result['parameters'] / 1e6:.2f} million parameters, 3 classes"
    assert [message.partition(":")[0] for message in (first, second)] == ["epoch 1/2", "epoch 2/2"]
    assert second.endswith(f" test accuracy {result['accuracy']:.2f}%, {second.split()[-2]} images/s")
    best = f"best {result['best_accuracy']:.2f}% after epoch {result['best_epoch']}"
    assert f"test accuracy {result['accuracy']:.2f}% ({best}), {result['images_per_second']:,.0f} images/s" in end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "error: --data nowhere: expected 'digits', a folder or torch/NAME"),
        (["train", "--data", "digits", "--epochs", "0"], "error: --epochs must be at least 1, got 0"),
        (["evaluate", "--data", "digits", "--checkpoint", "nowhere.pt"], "error: checkpoint nowhere.pt does not exist"),
        (["demo", "--epochs", "1"], "error: --epochs must be at least 2, got 1"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train"], "--data"),
        (["train", "--data", "digits", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "--data", "digits", "--model-kwargs", "depth"], "expected key=value, got 'depth'"),
        (["train", "--data", "digits", "--amp", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_do_not_parse_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failed_run_is_one_line_and_status_1(train_arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", lambda self, x, y: x.sum() * float("inf"))
    assert main(train_arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the loss of step")


@pytest.mark.parametrize(
    ("epoch", "message"),
    [(1, "interrupted before the first checkpoint"), (2, "to go on: python -m ceit train --model")],
)
def test_ctrl_c_says_how_to_resume(train_arguments, monkeypatch, capsys, epoch, message):
    test_epoch = training._test_epoch

    def interrupt(run, loader):
        if run.epoch == epoch:
            raise KeyboardInterrupt
        test_epoch(run, loader)

    monkeypatch.setattr(training, "_test_epoch", interrupt)
    assert main(train_arguments) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert last.endswith("--resume") == (epoch == 2)


def test_info_says_what_would_run_and_with_what(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(
        name in text
        for name in (
            "leff",
            "lca",
            "i2t",
            "add_norm",
            "linear",
            "attention",
            f"torch {torch.__version__}",
            "triton",
            "python",
            "cpu ",
        )
    )
