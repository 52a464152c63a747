"""Options of training and evaluation: one definition each for Python (dataclasses) and for the command line."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .fields import option

AMP_TYPES = ("none", "bfloat16", "float16")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "plateau", "none")
PLATEAU_METRICS = ("accuracy", "loss")
FORMATS = ("pt2", "onnx", "openvino", "safetensors", "hub")


class _Size(argparse.Action):
    """One number, or height and width."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        if len(values) > 2:
            parser.error(f"argument {option_string}: expected one number or two, got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


_model = partial(option, group="model")
_data = partial(option, group="data")
_machine = partial(option, group="machine")
_optimisation = partial(option, group="optimisation")
_augmentation = partial(option, group="augmentation")
_output = partial(option, group="output")
_DIGITS_OR_FOLDER = (
    "'digits' (scikit-learn's 1,797 scanned digits), a folder with train/ and val/ (validation/, test/), each with one "
    "folder of images per class, or a set: torch/NAME of torchvision, hfds/NAME of Hugging Face, tfds/NAME of "
    "TensorFlow Datasets, wds/NAME of WebDataset"
)
_BACKENDS = (
    "auto, reference, native, triton or library, or for some operators only, e.g. lca=triton; unless given, the "
    "environment's CEIT_KERNELS_BACKEND, or auto"
)


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """What all jobs have in common: the model."""

    model: str = _model(
        "ceit_tiny_patch16_224", "name of the model, or a folder that `ceit export --format hub` wrote", metavar="NAME"
    )
    model_kwargs: Mapping[str, Any] = _model({}, "arguments of the model, e.g. depth=6", key_values=True)
    num_classes: int | None = _model(None, "number of classes; unless given the data's", type=int, at_least=1)
    img_size: int | Sequence[int] | None = _model(
        None,
        "height and width of the input in pixels, or one number for both; unless given the model's own",
        type=int,
        nargs="+",
        action=_Size,
        at_least=1,
        metavar="PIXELS",
    )
    checkpoint: str | None = _model(None, "file with the weights to start from", metavar="PATH")
    fused: bool | str = _model(
        "auto",
        "use the fused operators; auto: those that are faster on this machine",
        action=argparse.BooleanOptionalAction,
    )


@dataclasses.dataclass(kw_only=True)
class MachineOptions:
    """What a job runs on, and by."""

    backend: str | None = _machine(None, f"what runs the fused operators: {_BACKENDS}")
    amp: str = _machine("none", "type of mixed precision", choices=AMP_TYPES)
    device: str = _machine("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    cuda_graphs: bool = _machine(
        False, "replay CUDA graphs: in training of whole steps; with several processes or --compile of the model"
    )


@dataclasses.dataclass(kw_only=True)
class RunOptions(MachineOptions, ModelOptions):
    """What training and evaluation have in common: the images too."""

    data: str = _data(None, _DIGITS_OR_FOLDER, required=True, metavar="digits|DIR|READER/NAME")
    data_dir: str | None = _data(None, "folder of the set that READER/NAME names", metavar="DIR")
    download: bool = _data(False, "fetch a set of torchvision or TensorFlow Datasets into --data-dir")
    train_split: str = _data(
        "train", "name of the training images' folder or split; for wds also its files, e.g. '{00..99}.tar|128000'"
    )
    test_split: str | None = _data(
        None, "name of the test images' folder or split; unless given val, validation or test, what there is"
    )
    batch_size: int = _data(128, "images per step and process", at_least=1)
    crop_pct: float | None = _data(
        None,
        "share of a test image's side that is kept; unless given the model's own, 1 for digits",
        type=float,
        above=0,
        at_most=1,
    )
    workers: int = _data(2, "processes that load images; 0 loads in the main process", at_least=0)


@dataclasses.dataclass(kw_only=True)
class TrainOptions(RunOptions):
    """Options of `ceit.train.train`."""

    exclude: Sequence[str] = _model(
        [],
        "what is not read from --checkpoint; a head of another size is left out by itself",
        nargs="*",
        metavar="NAME",
    )
    drop_path: float = _model(0.1, "rate of stochastic depth", at_least=0, below=1)
    freeze_bn: bool = _model(False, "keep BatchNorm as the checkpoint has it: statistics, weights and biases")
    grad_checkpointing: bool = _model(False, "recompute activations in backward to save memory")
    sync_bn: bool = _model(False, "BatchNorm statistics over all processes")

    compile: bool = _machine(False, "train through torch.compile")
    fsdp: bool = _machine(False, "shard weights and optimizer over the processes (FSDP2)")

    epochs: int = _optimisation(100, "passes over the training images", at_least=1)
    accumulate: int = _optimisation(1, "batches whose gradients make one update", at_least=1)
    opt: str = _optimisation("adamw", "optimizer, by timm's name", metavar="NAME")
    opt_kwargs: Mapping[str, Any] = _optimisation(
        {}, "arguments of the optimizer, e.g. eps=1e-8 betas=0.9,0.95", key_values=True
    )
    lr: float | None = _optimisation(
        None, "learning rate after warmup; unless given by --lr-base, without that 0.001", type=float, above=0
    )
    lr_base: float | None = _optimisation(
        None,
        "learning rate for 512 images per update, scaled to their number; --lr goes before it",
        type=float,
        above=0,
    )
    layer_decay: float | None = _optimisation(
        None, "factor of the learning rate from each layer to the one below", type=float, above=0, at_most=1
    )
    weight_decay: float = _optimisation(0.05, "weight decay of all but biases, norms and positions", at_least=0)
    clip_grad: float | None = _optimisation(
        None, "largest norm of the gradient; not clipped unless given", type=float, above=0
    )
    sched: str = _optimisation("cosine", "course of the learning rate", choices=SCHEDULES)
    warmup_epochs: int | None = _optimisation(
        None, "epochs of linear warmup; unless given 5, or a quarter of fewer than 20", type=int, at_least=0
    )
    warmup_lr: float | None = _optimisation(
        None, "learning rate at the start of warmup; unless given 1e-6 or a hundredth of --lr", type=float, at_least=0
    )
    min_lr: float | None = _optimisation(
        None, "lowest learning rate; unless given 1e-5, or a hundredth of --lr", type=float, at_least=0
    )
    decay_epochs: float = _optimisation(30.0, "epochs between the steps of --sched step", above=0)
    decay_milestones: Sequence[int] = _optimisation(
        [90, 180, 270], "epochs of the steps of --sched multistep", type=int, nargs="+", above=0
    )
    decay_rate: float = _optimisation(0.1, "factor of a step or fall, or the power of --sched poly", above=0)
    patience_epochs: int = _optimisation(
        10, "with --sched plateau, epochs that may be no better than the best before the rate falls", at_least=0
    )
    plateau_metric: str = _optimisation(
        "accuracy", "test figure that --sched plateau looks at", choices=PLATEAU_METRICS
    )
    cooldown_epochs: int = _optimisation(0, "of --epochs, the last ones at --min-lr", at_least=0)
    label_smoothing: float = _optimisation(0.1, "probability spread over all classes", at_least=0, below=1)
    ema: bool = _optimisation(False, "also keep averaged weights; the test figures are then theirs")
    ema_decay: float = _optimisation(0.9999, "decay of the average, reached by degrees", above=0, below=1)
    seed: int = _optimisation(0, "seed of everything random", at_least=0, at_most=2**32 - 1)

    scale: Sequence[float] | None = _augmentation(
        None,
        "range of the random crop's area; unless given 0.08 1, for digits 0.8 1",
        type=float,
        nargs=2,
        above=0,
        at_most=1,
        metavar=("MIN", "MAX"),
    )
    ratio: Sequence[float] | None = _augmentation(
        None,
        "range of the random crop's aspect ratio; unless given 0.75 1.33, for digits 0.85 1.18",
        type=float,
        nargs=2,
        above=0,
        metavar=("MIN", "MAX"),
    )
    hflip: float | None = _augmentation(
        None, "probability of a horizontal flip; unless given 0.5, for digits 0", type=float, at_least=0, at_most=1
    )
    color_jitter: float = _augmentation(0.0, "strength of colour jitter; --auto-augment goes before it", at_least=0)
    auto_augment: str | None = _augmentation(
        None, "timm's policy, e.g. rand-m9-mstd0.5-inc1; off unless given", metavar="POLICY"
    )
    aug_repeats: int = _augmentation(0, "augmented versions of an image in an epoch of as many steps", at_least=0)
    random_erasing: float = _augmentation(0.0, "probability of erasing a patch", at_least=0, at_most=1)
    mixup: float = _augmentation(0.0, "alpha of mixup; 0 is off", at_least=0)
    cutmix: float = _augmentation(0.0, "alpha of cutmix; 0 is off", at_least=0)
    mixup_prob: float = _augmentation(1.0, "probability of mixing a batch", at_least=0, at_most=1)
    mixup_switch_prob: float = _augmentation(
        0.5, "probability of cutmix where both are on, instead of mixup", at_least=0, at_most=1
    )

    output: str = _output("runs/train", "folder of the checkpoints and the metrics", metavar="DIR")
    tensorboard: bool = _output(False, "also write the metrics for TensorBoard, into the output folder")
    resume: str | None = _output(
        None,
        "go on from a checkpoint; auto (or no value): from the output folder's, if there is one",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
    )


_weights = partial(
    _model,
    None,
    "file with the weights, of `ceit train`, timm or the published code; not needed where --model is a folder",
    metavar="PATH",
)
_recorded_model = partial(
    _model, None, "name of the model, or a folder; needed unless the checkpoint is one of `ceit train`", metavar="NAME"
)
_ema = partial(_model, False, "take the averaged weights")


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(RunOptions):
    """Options of `ceit.evaluate.evaluate_checkpoint`; what a checkpoint of `ceit train` records need not be given."""

    checkpoint: str | None = _weights()
    model: str | None = _recorded_model()
    ema: bool = _ema()
    output: str | None = _output(
        None, "folder for results.json, per_class.csv and confusion.png; none unless given", metavar="DIR"
    )


@dataclasses.dataclass(kw_only=True)
class PredictOptions(MachineOptions, ModelOptions):
    """Options of `ceit.predict.predict`; what a checkpoint of `ceit train` records need not be given."""

    images: Sequence[str] = option(
        [], "pictures, or folders of them", group="images", positional=True, nargs="+", metavar="IMAGE"
    )
    checkpoint: str | None = _weights()
    model: str | None = _recorded_model()
    ema: bool = _ema()
    batch_size: int = _data(16, "images at a time", at_least=1)
    crop_pct: float | None = _data(
        None, "share of an image's side that is kept; unless given the model's own", type=float, above=0, at_most=1
    )
    topk: int = _output(5, "classes per image", at_least=1)
    format: str = _output("table", "how they are printed", choices=("table", "json", "csv"))
    explain: str | None = _output(
        None, "folder for a picture per image of what class-token attention (LCA) looks at", metavar="DIR"
    )


@dataclasses.dataclass(kw_only=True)
class ExportOptions(ModelOptions):
    """Options of `ceit.export.export`; what a checkpoint of `ceit train` records need not be given."""

    checkpoint: str | None = _weights()
    model: str | None = _recorded_model()
    ema: bool = _ema()
    fused: bool = _model(False, "keep the fused operators in pt2, which needs ceit_kernels where it is loaded then")
    format: Sequence[str] = _output(["pt2"], "one or more of the formats", nargs="+", choices=FORMATS)
    output: str = _output("runs/export", "folder of the exported files", metavar="DIR")
