"""Training: `train(TrainOptions(...))` from Python, `python -m ceit train` from the command line.

Everything random in an epoch follows from (seed, epoch, rank), and the learning rate from the number of the update, so
that a run that was killed goes on from its last checkpoint with exactly the numbers that it would have had.
"""

import contextlib
import dataclasses
import logging
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch import nn

from .checkpoint import load_checkpoint
from .data import check_classes, create_test_loader, create_train_loader, open_split, resolve_data_options
from .evaluate import evaluate
from .runtime import checkpoints
from .runtime.building import build_model, number_of_classes
from .runtime.distributed import Place, parallel, processes
from .runtime.machine import AMP_DTYPES, autocast, backend, fused_operators, peak_memory_mb, versions
from .runtime.options import TrainOptions, UsageError, check, plain, usage_errors
from .runtime.progress import EpochProgress, progress_bar

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to, as `result.json` has it.

    Accuracies are of the test images in percent, of the averaged weights with `ema`. Images per second are those of
    training, the median over the epochs; `peak_memory_mb` is of tensors on a GPU, of the whole process on a CPU.
    """

    accuracy: float
    best_accuracy: float
    best_epoch: int
    epochs: int
    images_per_second: float
    peak_memory_mb: float | None
    device: str
    processes: int
    fused_operators: dict[str, dict[str, str]]
    versions: dict[str, str]
    step_losses: list[float]


@dataclasses.dataclass
class Run:
    """Everything that a step of training changes or uses."""

    options: TrainOptions
    place: Place
    model: nn.Module
    forward: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
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


def train(options: TrainOptions) -> Result:
    """Train a model, or go on with its training, and leave checkpoints and metrics in `options.output`.

    Returns:
        The result, which is also written to `result.json`.

    Raises:
        UsageError: an option, the data or a checkpoint cannot be used; raised before anything is written.
        TrainingFailed: the loss became infinite or not a number.
    """
    check(options)
    _check_together(options)
    with processes(options.device) as place, backend(options.backend):
        checkpoint = checkpoints.find_checkpoint(options)
        train_split, test_split = open_split(options.data, training=True), open_split(options.data, training=False)
        check_classes(train_split.classes, test_split.classes, "the training and the test images")
        options = resolve_data_options(options)
        options = dataclasses.replace(options, num_classes=number_of_classes(options, train_split.classes))
        saved_options = {**plain(options), "world_size": place.world_size}
        state = None
        if checkpoint is not None:
            state = checkpoints.load_checkpoint_state(checkpoint)
            checkpoints.check_same_options(state["options"], saved_options, checkpoint)

        random_seed(options.seed)
        model = _prepare_model(options, place)
        operators = fused_operators(model, place.device, AMP_DTYPES[options.amp])
        config = resolve_model_data_config(model, args={"img_size": options.img_size})
        train_loader = create_train_loader(train_split, options, config, place)
        test_loader = create_test_loader(test_split, options, config, place)
        run = _prepare_run(model, options, place, len(train_loader))
        if state is not None:
            _restore(run, state)
            _logger.info("going on after epoch %d of %s", run.epoch, checkpoint)

        place.wait()  # the first writes only after all have found the output folder as it was
        output = checkpoints.create_output(options, saved_options) if place.primary else None
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place.device)
        while run.epoch < options.epochs:
            _seed_epoch(train_loader, options.seed, run.epoch, place)
            _train_epoch(run, train_loader)
            _test_epoch(run, test_loader)
            if place.primary:
                _save(run, output, {"options": saved_options, "classes": list(train_split.classes)})
        result = _summarize(run, operators)
        if place.primary:
            checkpoints.write_json(output / checkpoints.RESULT, dataclasses.asdict(result))
        return result


def _check_together(options: TrainOptions) -> None:
    """Check what single options cannot show."""
    if options.warmup_epochs and options.warmup_epochs >= options.epochs:
        raise UsageError(f"--warmup-epochs must be below --epochs, {options.epochs}, got {options.warmup_epochs}")
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        raise UsageError(f"--batch-size must be even with --mixup or --cutmix, got {options.batch_size}")
    if options.min_lr > options.lr:
        raise UsageError(f"--min-lr must be at most --lr, {options.lr}, got {options.min_lr}")


def _prepare_model(options: TrainOptions, place: Place) -> nn.Module:
    model = build_model(options, drop_path_rate=options.drop_path)
    if options.checkpoint is not None:
        with usage_errors("--checkpoint"):
            load_checkpoint(model, options.checkpoint, exclude=options.exclude)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.sync_bn:
        if place.device.type != "cuda" or not place.distributed:
            raise UsageError("--sync-bn needs several processes, started by torchrun, with a CUDA GPU each")
        model = convert_sync_batchnorm(model)
    return model.to(place.device)


def _prepare_run(model: nn.Module, options: TrainOptions, place: Place, batches: int) -> Run:
    with usage_errors(f"--opt {options.opt}"):
        optimizer = create_optimizer_v2(model, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=-(-batches // options.accumulate),
    )
    mixup = None
    if options.mixup or options.cutmix:
        mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            label_smoothing=options.label_smoothing,
            num_classes=options.num_classes,
        )
    forward = parallel(model, place)
    if options.compile:
        forward = torch.compile(forward)
    return Run(
        options=options,
        place=place,
        model=model,
        forward=forward,
        ema=ModelEmaV3(model, decay=options.ema_decay, use_warmup=True) if options.ema else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(place.device.type, enabled=options.amp == "float16"),
        mixup=mixup,
        loss=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else options.label_smoothing),
    )


def _seed_epoch(loader: Iterable, seed: int, epoch: int, place: Place) -> None:
    """Seed all that is random in an epoch; the loader's workers are seeded from torch's generator as they start."""
    random_seed(int(np.random.SeedSequence([seed, epoch, place.rank]).generate_state(1)[0]))
    if place.distributed:
        loader.sampler.set_epoch(epoch)


def _train_epoch(run: Run, loader: Iterable) -> None:
    """One pass over the training images; adds the epoch's record to the run's history."""
    options, place = run.options, run.place
    batches, start = len(loader), time.perf_counter()
    images_here = batches * options.batch_size
    run.model.train()
    with progress_bar(images_here, f"epoch {run.epoch + 1}/{options.epochs}", place.primary) as bar:
        progress = EpochProgress(bar)
        for step, (images, targets) in enumerate(loader):
            first = step - step % options.accumulate
            group = min(options.accumulate, batches - first)  # the last update of an epoch may have fewer batches
            updates = step + 1 == first + group
            inputs, mixed = run.mixup(images, targets) if run.mixup else (images, targets)
            # Processes exchange gradients only where an update follows.
            with contextlib.nullcontext() if updates or not place.distributed else run.forward.no_sync():
                with autocast(place.device, options.amp):
                    logits = run.forward(inputs)
                loss = run.loss(logits.float(), mixed)
                run.scaler.scale(loss / group).backward()
            if updates:
                _update(run)
            progress.add(loss, logits, targets)
        progress.read()
    seconds = time.perf_counter() - start
    losses = [total / place.world_size for total in place.sum(progress.losses)]
    run.step_losses += losses
    run.epoch += 1
    run.history.append(
        {
            "epoch": run.epoch,
            "train_loss": statistics.fmean(losses),
            "images_per_second": images_here * place.world_size / seconds,
            "lr": run.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
        }
    )


def _update(run: Run) -> None:
    """Apply the gradients that backward left, then move the averaged weights and the learning rate on."""
    if run.options.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.updates += 1
    if run.ema is not None:
        run.ema.update(run.model, step=run.updates)
    if run.scheduler is not None:
        run.scheduler.step_update(run.updates)


def _test_epoch(run: Run, loader: Iterable) -> None:
    """Evaluate, and complete the epoch's record."""
    if run.place.distributed:
        for model in filter(None, [run.model, run.ema and run.ema.module]):
            distribute_bn(model, run.place.world_size, reduce=True)
    metrics = evaluate(run.evaluated, loader, run.place, run.options.amp)
    record = run.history[-1]
    record |= {"test_loss": metrics.loss, "test_accuracy": metrics.top1}
    _logger.info(
        "epoch %d/%d: train loss %.4f, test loss %.4f, test accuracy %.2f%%, %.0f images/s",
        run.epoch,
        run.options.epochs,
        record["train_loss"],
        metrics.loss,
        metrics.top1,
        record["images_per_second"],
    )


def _save(run: Run, output: Path, about: dict[str, Any]) -> None:
    state = {
        "format": checkpoints.FORMAT,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "epoch": run.epoch,
        "updates": run.updates,
        "history": run.history,
        "step_losses": torch.tensor(run.step_losses, dtype=torch.float64),
        **about,
    }
    if run.ema is not None:
        state["model_ema"] = run.ema.module.state_dict()
    if run.scaler.is_enabled():
        state["scaler"] = run.scaler.state_dict()
    # The best first: were it second, a kill between the two would leave a best.pt that resuming never mends.
    if _best(run.history)["epoch"] == run.epoch:
        checkpoints.save_checkpoint(output / checkpoints.BEST, state)
    checkpoints.save_checkpoint(output / checkpoints.LAST, state)
    checkpoints.write_metrics(output / checkpoints.METRICS, run.history)


def _restore(run: Run, state: dict[str, Any]) -> None:
    with usage_errors("--resume"):
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.ema is not None:
            run.ema.module.load_state_dict(state["model_ema"])
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.updates, run.history = state["epoch"], state["updates"], state["history"]
    run.step_losses = state["step_losses"].tolist()


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    """The record of the first epoch with the highest test accuracy."""
    return max(history, key=lambda record: record["test_accuracy"])


def _summarize(run: Run, operators: dict[str, dict[str, str]]) -> Result:
    best = _best(run.history)
    return Result(
        accuracy=run.history[-1]["test_accuracy"],
        best_accuracy=best["test_accuracy"],
        best_epoch=best["epoch"],
        epochs=run.epoch,
        images_per_second=statistics.median(record["images_per_second"] for record in run.history),
        peak_memory_mb=peak_memory_mb(run.place.device),
        device=str(run.place.device),
        processes=run.place.world_size,
        fused_operators=operators,
        versions=versions(),
        step_losses=run.step_losses,
    )
