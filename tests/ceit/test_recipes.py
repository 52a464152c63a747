import json

import pytest

from ceit.__main__ import build_parser, main
from ceit.evaluate import evaluate_checkpoint
from ceit.runtime.checkpoints import load_checkpoint_state
from ceit.runtime.distributed import Place
from ceit.runtime.errors import UsageError
from ceit.runtime.fields import check
from ceit.runtime.options import EvaluateOptions, TrainOptions
from ceit.runtime.recipes import recipes, with_recipe
from ceit.runtime.setup import check_together, resolve
from ceit.train import train

CPU = Place("cpu")


def options_of(*words, data=("--data", "digits")):
    given = vars(build_parser().parse_args(["train", *with_recipe([*data, *words])]))
    return TrainOptions(**{k: v for k, v in given.items() if k not in ("command", "options")})


def test_the_recipes_of_the_issue_are_there():
    assert recipes() == ["ceit-finetune-384", "ceit-imagenet", "digits", "transfer"]


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_options_that_can_be_used(name):
    options = options_of("--recipe", name, "--checkpoint", "weights.pt")
    check(options)
    check_together(options)
    assert resolve(options, CPU, None).lr > 0


def test_the_recipe_of_imagenet_is_the_papers():
    options = resolve(options_of("--recipe", "ceit-imagenet", "--batch-size", "256"), Place("cpu", 0, 4), None)
    assert options.lr == pytest.approx(5e-4 * 256 * 4 / 512)
    assert (options.epochs, options.warmup_epochs, options.min_lr) == (300, 5, 1e-5)
    assert (options.opt, options.opt_kwargs, options.weight_decay) == (
        "adamw",
        {"eps": 1e-8, "betas": [0.9, 0.999]},
        0.05,
    )
    assert (options.mixup, options.cutmix, options.mixup_prob, options.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (options.auto_augment, options.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (options.random_erasing, options.aug_repeats, options.label_smoothing) == (0.25, 3, 0.1)
    assert (options.ema, options.ema_decay, options.drop_path) == (True, 0.99996, 0.1)


def test_the_command_line_goes_before_the_config_before_the_recipe_before_defaults(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("weight-decay: 0.3\nmixup: 0.2\nema: false\nopt_kwargs: {eps: 1.0e-7}\n")
    options = options_of("--mixup", "0.1", "--recipe", "ceit-imagenet", "--config", str(config))
    assert (options.mixup, options.weight_decay, options.ema, options.cutmix) == (0.1, 0.3, False, 1.0)
    assert (options.opt_kwargs, options.sched) == ({"eps": 1e-7}, "cosine")


def test_a_few_epochs_of_a_recipe_need_no_other_option():
    options = resolve(options_of("--recipe", "ceit-imagenet", "--epochs", "3"), CPU, None)
    assert (options.epochs, options.warmup_epochs) == (3, 0)


def test_the_resolved_options_are_saved_and_make_the_same_run(options, arguments_of, tmp_path):
    config = tmp_path / "short.yaml"
    config.write_text("epochs: 1\n")
    words = arguments_of(options(epochs=1))
    assert main([*words, "--recipe", "ceit-imagenet", "--config", str(config), "--mixup", "0"]) == 0
    saved = json.loads((tmp_path / "run" / "options.json").read_text())
    again = options_of("--config", str(tmp_path / "run" / "options.json"), "--output", str(tmp_path / "again"), data=())
    assert train(again).epochs == 1
    repeated = json.loads((tmp_path / "again" / "options.json").read_text())
    assert {**repeated, "output": ""} == {**saved, "output": ""}


@pytest.mark.parametrize("name", ["ceit-finetune-384", "transfer"])
def test_recipes_that_go_on_from_a_trained_model_ask_for_it(name, tmp_path, capsys):
    assert main(["train", "--data", "digits", "--recipe", name, "--model", "ceit_tiny_patch16_384"]) == 2
    assert f"error: --recipe {name} goes on from a trained model: give --checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert options_of("--recipe", name, "--model", str(tmp_path)).model == str(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--recipe", name, "--help"])


@pytest.mark.parametrize("batch_size", [8, 64, 4096])
def test_the_rates_of_fine_tuning_fit_any_batch(batch_size):
    words = ["--recipe", "ceit-finetune-384", "--checkpoint", "weights.pt", "--batch-size", str(batch_size)]
    options = resolve(options_of(*words), CPU, None)
    assert max(options.min_lr, options.warmup_lr) < options.lr == pytest.approx(5e-6 * batch_size / 512)


def test_the_published_training_is_alike_plain_and_fused_and_fine_tuning_starts_where_it_ended(image_folder, tmp_path):
    common = ["--data", str(image_folder), "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2", "--workers", "0"]
    common += ["--batch-size", "8", "--device", "cpu"]

    def run(name, *words):
        assert main(["train", *common, *words, "--output", str(tmp_path / name)]) == 0
        result = json.loads((tmp_path / name / "result.json").read_text())
        return result, load_checkpoint_state(tmp_path / name / "last.pt")["history"]

    recipe = ("--recipe", "ceit-imagenet", "--epochs", "2", "--img-size", "32")
    plain, _ = run("plain", *recipe, "--no-fused")
    fused, _ = run("fused", *recipe, "--fused")
    assert fused["step_losses"] == pytest.approx(plain["step_losses"], rel=1e-4)
    # At a rate this small, and with norms that stay, an epoch changes next to nothing.
    path = str(tmp_path / "fused" / "last.pt")
    larger = ("--recipe", "ceit-finetune-384", "--checkpoint", path, "--img-size", "48", "--epochs", "1", "--freeze-bn")
    _, history = run("tuned", *larger, "--fused")
    start = {"img_size": 48, "crop_pct": 1.0, "workers": 0, "device": "cpu"}
    before = evaluate_checkpoint(EvaluateOptions(data=str(image_folder), checkpoint=path, **start))
    assert history[0]["test_loss"] == pytest.approx(before.loss, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown option epoch, did you mean epochs"),
        ("- 3", "expected lines such as"),
        ("a: [", "not YAML"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_options_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        with_recipe(["--config", str(path)])
    assert main(["train", "--data", "digits", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_recipe_is_refused(capsys):
    assert main(["train", "--data", "digits", "--recipe", "resnet"]) == 2
    assert "invalid choice: 'resnet'" in capsys.readouterr().err
