"""What a run of training is made of: complete options, the model, its optimizer, schedule and loss."""

import dataclasses
import logging
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ceit_kernels import graphed
from ceit_kernels.common.sync_norm import SyncBatchNorm2d

from ..checkpoint import load_checkpoint, number_of_outputs
from ..data import resolve_data_options
from ..registry import is_model_folder
from .building import build_model
from .distributed import Place, parallel
from .errors import UsageError, needed, usage_errors
from .fields import flag
from .machine import check_graphs
from .options import TrainOptions
from .schedules import check_schedule, create_schedule
from .sharding import shard

_logger = logging.getLogger(__name__)

# Options whose default follows from others: a run that goes on keeps what it had.
_DERIVED = ("lr", "min_lr", "warmup_lr", "warmup_epochs", "scale", "ratio", "hflip", "crop_pct")


# Why no CUDA graph holds what some options ask for.
_NOT_CAPTURED = {
    "fsdp": "sharded weights have no address that a graph could hold",
    "sync_bn": "processes exchange statistics in the middle of a step",
    "grad_checkpointing": "what is recomputed reads the state of the random numbers, which waits for the GPU",
}


@dataclasses.dataclass
class Run:
    """Everything that a step of training changes or uses."""

    options: TrainOptions
    place: Place
    model: nn.Module
    forward: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    loss: nn.Module
    updates: int = 0
    epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    step_losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The model whose test figures count."""
        return self.ema.module if self.ema else self.model

    def note_epoch(self, record: dict[str, float]) -> None:
        """Tell the schedule an epoch's test figures, by which it may choose the next learning rate."""
        self.scheduler.step(int(record["epoch"]), record[f"test_{self.options.plateau_metric}"])
        self.scheduler.step_update(self.updates)


def resolve(options: TrainOptions, place: Place, state: dict[str, Any] | None) -> TrainOptions:
    """Fill in what was not given: from the run that goes on, or by the data, the epochs and the images per update."""
    if state is not None:
        missing = {name: state["options"].get(name) for name in _DERIVED if getattr(options, name) is None}
        options = dataclasses.replace(options, **missing)
    options = resolve_data_options(options)
    images = options.batch_size * options.accumulate * place.world_size
    lr = options.lr or (options.lr_base * images / 512 if options.lr_base else 1e-3)
    min_lr = min(1e-5, lr / 100) if options.min_lr is None else options.min_lr
    warmup_lr = min(1e-6, lr / 100) if options.warmup_lr is None else options.warmup_lr
    options = dataclasses.replace(options, lr=lr, min_lr=min_lr, warmup_lr=warmup_lr)
    if options.warmup_epochs and options.warmup_epochs >= options.epochs:
        raise UsageError(f"--warmup-epochs must be below --epochs, {options.epochs}, got {options.warmup_epochs}")
    if options.warmup_epochs and options.warmup_epochs + options.cooldown_epochs > options.epochs:
        raise UsageError(
            f"--warmup-epochs and --cooldown-epochs must fit in --epochs, {options.epochs}, got "
            f"{options.warmup_epochs} and {options.cooldown_epochs}"
        )
    for name in ("min_lr", "warmup_lr"):
        if getattr(options, name) > lr:
            raise UsageError(f"{flag(name)} must be at most --lr, {lr}, got {getattr(options, name)}")
    return options


def check_together(options: TrainOptions) -> None:
    """Check what single options cannot show."""
    check_schedule(options)
    if options.cooldown_epochs >= options.epochs:
        raise UsageError(f"--cooldown-epochs must be below --epochs, {options.epochs}, got {options.cooldown_epochs}")
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        raise UsageError(f"--batch-size must be even with --mixup or --cutmix, got {options.batch_size}")
    for name in ("lr", "weight_decay", "layer_decay"):
        if name in options.opt_kwargs:
            raise UsageError(f"--opt-kwargs {name}={options.opt_kwargs[name]}: give it as {flag(name)}")
    for name in ("scale", "ratio"):
        ends = getattr(options, name)
        if ends is not None and ends[0] > ends[1]:
            raise UsageError(f"{flag(name)} must be the smaller number and the larger, got {ends[0]:g} {ends[1]:g}")
    if options.freeze_bn and options.checkpoint is None and not is_model_folder(options.model):
        raise UsageError("--freeze-bn keeps what --checkpoint has, which is not given")
    if options.exclude and options.checkpoint is None:
        raise UsageError("--exclude says what is not read from --checkpoint, which is not given")
    if options.checkpoint is not None and is_model_folder(options.model):
        raise UsageError("--checkpoint: a folder as --model brings its own weights")
    if options.cuda_graphs:
        for name in ("fsdp", "sync_bn", "grad_checkpointing"):
            if getattr(options, name):
                raise UsageError(f"--cuda-graphs and {flag(name)}: {_NOT_CAPTURED[name]}; give one of the two")
    if options.fsdp and (options.amp == "float16" or options.compile):
        raise UsageError("--fsdp goes with neither --amp float16 nor --compile")
    if options.tensorboard:
        with needed("--tensorboard", "tensorboard"):
            import torch.utils.tensorboard  # noqa: F401
    if options.freeze_bn and options.sync_bn:
        raise UsageError("--freeze-bn and --sync-bn: frozen statistics are not computed, give one of the two")


def prepare_model(options: TrainOptions, place: Place) -> nn.Module:
    """The model that the options describe, with the weights of `options.checkpoint`, on this process's device.

    Raises:
        UsageError: the model or the checkpoint cannot be used, or an option does not fit this machine.
    """
    if options.cuda_graphs:
        check_graphs(place.device)
    model: Any = build_model(options, drop_path_rate=options.drop_path)
    if options.checkpoint is not None:
        with usage_errors("--checkpoint"):
            load_checkpoint(model, options.checkpoint, exclude=_excluded(options, options.checkpoint))
    if options.freeze_bn:
        for norm in batch_norms(model):
            norm.requires_grad_(False)
    if options.fsdp and not place.distributed:
        raise UsageError("--fsdp needs several processes, started by torchrun or SLURM")
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.sync_bn:
        if not place.distributed:
            raise UsageError("--sync-bn needs several processes, started by torchrun or SLURM")
        if place.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        else:
            SyncBatchNorm2d.convert(model)
    return model.to(place.device)


def _excluded(options: TrainOptions, checkpoint: str) -> list[str]:
    """What is not read from the checkpoint: a head of another size neither."""
    found = number_of_outputs(checkpoint)
    if "head" in options.exclude or found in (None, options.num_classes):
        return list(options.exclude)
    _logger.info("the checkpoint's head is for %d classes: a new one for %d begins", found, options.num_classes)
    return [*options.exclude, "head"]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All BatchNorms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _one_call_for_all_tensors(options: TrainOptions, place: Place) -> dict[str, bool]:
    """Arguments by which Adam and AdamW update all tensors in one call, which PyTorch by itself does on no CPU.

    CeiT-S's update by AdamW took 20 ms on one core that way, and 58 without (PyTorch 2.14.1).
    """
    served = place.device.type == "cpu" and not options.fsdp and not options.cuda_graphs
    chosen = {"foreach", "fused", "capturable", "differentiable"} & options.opt_kwargs.keys()
    return {"fused": True} if served and options.opt in ("adam", "adamw") and not chosen else {}


def prepare_run(model: nn.Module, options: TrainOptions, place: Place, batches: int) -> Run:
    """Everything that training needs beside the images.

    Args:
        model: from `prepare_model`; sharded in place where the options say so.
        options: complete options.
        place: this process's device and rank.
        batches: steps of an epoch.

    Raises:
        UsageError: unknown optimizer, or arguments that it does not take.
    """
    ema = None
    if options.ema:
        # Sharded tensors are averaged one by one.
        ema = ModelEmaV3(model, decay=options.ema_decay, use_warmup=True, foreach=not options.fsdp)
    if options.fsdp:
        for sharded in filter(None, [model, ema and ema.module]):
            shard(sharded, place)
    with usage_errors(f"--opt {options.opt}"):
        optimizer = create_optimizer_v2(
            model,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            layer_decay=options.layer_decay,
            **_one_call_for_all_tensors(options, place),
            **options.opt_kwargs,
        )
    if options.cuda_graphs and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["capturable"] = True
    mixup = None
    if options.mixup or options.cutmix:
        mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            label_smoothing=options.label_smoothing,
            num_classes=options.num_classes or 0,
        )
    by_model = options.cuda_graphs and place.distributed and not options.compile
    forward: Any = model if options.fsdp else parallel(graphed(model) if by_model else model, place)
    if options.compile:
        forward = torch.compile(forward, mode="reduce-overhead") if options.cuda_graphs else torch.compile(forward)
    return Run(
        options=options,
        place=place,
        model=model,
        forward=forward,
        ema=ema,
        optimizer=optimizer,
        scheduler=create_schedule(optimizer, options, updates_per_epoch=-(-batches // options.accumulate)),
        scaler=torch.amp.GradScaler(place.device.type, enabled=options.amp == "float16"),
        mixup=mixup,
        loss=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else options.label_smoothing),
    )
