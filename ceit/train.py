"""Training: `train(TrainOptions(...))` from Python, `python -m ceit train` from the command line.

Everything random in an epoch follows from (seed, epoch, rank), and the learning rate from the number of the update, so
that a run that was killed goes on from its last checkpoint with exactly the numbers that it would have had.
"""

import contextlib
import dataclasses
import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from timm.utils import distribute_bn, random_seed

from .data import check_classes, create_test_loader, create_train_loader, open_split, shuffle
from .evaluate import evaluate, number_of_parameters
from .runtime import checkpoints
from .runtime.building import input_arguments, number_of_classes, numbered_classes
from .runtime.distributed import Place, processes
from .runtime.errors import UsageError, usage_errors
from .runtime.fields import check, plain
from .runtime.files import claimed, write_csv, write_json, write_json_lines
from .runtime.machine import AMP_DTYPES, backend, compile_kernels, fused_operators, peak_memory_mb, versions
from .runtime.options import TrainOptions
from .runtime.progress import EpochProgress, TrainingFailed, progress_bar
from .runtime.setup import Run, batch_norms, check_together, prepare_model, prepare_run, resolve
from .runtime.sharding import full_state, load_full_state
from .runtime.steps import Step, steps

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
    parameters: int
    images_per_second: float
    peak_memory_mb: float | None
    device: str
    processes: int
    fused_operators: dict[str, dict[str, str]]
    versions: dict[str, str]
    step_losses: list[float]


def train(options: TrainOptions) -> Result:
    """Train a model, or go on with its training, and leave checkpoints and metrics in `options.output`.

    Returns:
        The result, which is also written to `result.json`.

    Raises:
        UsageError: an option, the data or a checkpoint cannot be used; raised before anything is written.
        TrainingFailed: the loss became infinite or not a number.
    """
    check(options)
    check_together(options)
    with processes(options.device) as place, backend(options), contextlib.ExitStack() as stack:
        checkpoint = checkpoints.find_checkpoint(options)
        state = None if checkpoint is None else checkpoints.load_state_to_resume(checkpoint)
        train_split, test_split = open_split(options, training=True), open_split(options, training=False)
        check_classes(train_split.classes, test_split.classes, "the training and the test images")
        options = resolve(options, place, state)
        options = dataclasses.replace(options, num_classes=number_of_classes(options, train_split.classes))
        classes = list(train_split.classes) or numbered_classes(options)
        saved_options = {**plain(options), "world_size": place.world_size}
        if checkpoint is not None and state is not None:
            checkpoints.check_same_options(state["options"], saved_options, checkpoint)

        random_seed(options.seed)
        model = prepare_model(options, place)
        operators = fused_operators(model, place.device, AMP_DTYPES[options.amp])
        config = resolve_model_data_config(model, args=input_arguments(options))
        if place.device.type == "cuda" and any(by["backend"] == "triton" for by in operators.values()):
            compile_kernels(model, (options.batch_size, *config["input_size"]), options.amp, place.primary)
        train_loader = create_train_loader(train_split, options, config, place)
        test_loader = create_test_loader(test_split, options, config, place)
        run = prepare_run(model, options, place, len(train_loader))
        if state is not None:
            _restore(run, state)
            _logger.info("going on after epoch %d of %s", run.epoch, checkpoint)

        output = Path(options.output)
        if place.primary:
            stack.enter_context(claimed(output))
            if checkpoints.find_checkpoint(options) != checkpoint:
                raise UsageError(f"--output {output} was used by another run in the meantime: give another folder")
        place.wait()  # none goes on where the first may not write
        if place.primary:
            with _writing(output):
                write_json(output / checkpoints.OPTIONS, saved_options)
        parameters = number_of_parameters(model)
        _logger.info("%s: %.2f million parameters, %d classes", options.model, parameters / 1e6, options.num_classes)
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place.device)
        take_step = steps(run)
        while run.epoch < options.epochs:
            _seed_epoch(options.seed, run.epoch, place)
            shuffle(train_loader, options.seed, run.epoch)
            _train_epoch(run, take_step, train_loader)
            _test_epoch(run, test_loader)
            _save(run, output, {"options": saved_options, "classes": classes})
        result = _summarize(run, operators, parameters)
        if place.primary:
            with _writing(output):
                write_json(output / checkpoints.RESULT, dataclasses.asdict(result))
                _draw(run, output)
        return result


def _seed_epoch(seed: int, epoch: int, place: Place) -> None:
    """Seed all that is random in an epoch; the loader's workers are seeded from torch's generator as they start."""
    random_seed(int(np.random.SeedSequence([seed, epoch, place.rank]).generate_state(1)[0]))


def _train_epoch(run: Run, take_step: Step, loader: Any) -> None:
    """One pass over the training images; adds the epoch's record to the run's history."""
    options, place = run.options, run.place
    batches, start = len(loader), time.perf_counter()
    images_here = batches * options.batch_size
    run.model.train()
    if options.freeze_bn:
        for norm in batch_norms(run.model):
            norm.eval()
    with progress_bar(images_here, f"epoch {run.epoch + 1}/{options.epochs}", place.primary) as bar:
        progress = EpochProgress(bar)
        for step, (images, targets) in enumerate(loader):
            first = step - step % options.accumulate
            group = min(options.accumulate, batches - first)  # the last update of an epoch may have fewer batches
            updates = step + 1 == first + group
            inputs, mixed = run.mixup(images, targets) if run.mixup else (images, targets)
            loss, logits = take_step(inputs, mixed, group, updates)
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
            "lr": max(group["lr"] for group in run.optimizer.param_groups),
            "seconds": seconds,
        }
    )


def _update(run: Run) -> None:
    """Count an update, and move the averaged weights and the learning rate on."""
    run.updates += 1
    if run.ema is not None:
        run.ema.update(run.model, step=run.updates)
    run.scheduler.step_update(run.updates)


def _test_epoch(run: Run, loader: Iterable) -> None:
    """Evaluate, and complete the epoch's record."""
    if run.place.distributed:
        for model in filter(None, [run.model, run.ema and run.ema.module]):
            distribute_bn(model, run.place.world_size, reduce=True)
    metrics = evaluate(run.evaluated, loader, run.place, run.options.amp)
    record = run.history[-1]
    record |= {"test_loss": metrics.loss, "test_accuracy": metrics.top1, "test_top5": metrics.top5}
    run.note_epoch(record)
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
        "model": full_state(run.model),
        "optimizer": full_state(run.model, run.optimizer),
        "epoch": run.epoch,
        "updates": run.updates,
        "history": run.history,
        "step_losses": torch.tensor(run.step_losses, dtype=torch.float64),
        **about,
    }
    if run.ema is not None:
        state["model_ema"] = full_state(run.ema.module)
    if run.scaler.is_enabled():
        state["scaler"] = run.scaler.state_dict()
    if not run.place.primary:
        return
    with _writing(output):
        # The best first: were it second, a kill between the two would leave a best.pt that resuming never mends.
        if _best(run.history)["epoch"] == run.epoch:
            checkpoints.save_checkpoint(output / checkpoints.BEST, state)
        checkpoints.save_checkpoint(output / checkpoints.LAST, state)
        # Written anew: epochs after the checkpoint that a run resumed from disappear.
        write_json_lines(output / checkpoints.METRICS, run.history)
        write_csv(output / checkpoints.METRICS_CSV, run.history)
        if run.options.tensorboard:
            _write_for_tensorboard(run, output)


def _write_for_tensorboard(run: Run, output: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(output)) as writer:
        for name, value in run.history[-1].items():
            writer.add_scalar(name, value, run.epoch)


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn a failure to write, which leaves the files as they were, into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise TrainingFailed(f"cannot write to {output}: {reason}; what was saved before is kept") from error


def _draw(run: Run, output: Path) -> None:
    try:
        from .runtime.plots import draw_curves
    except ImportError as error:
        _logger.info("no %s without %s: pip install 'ceit-kernels[demo]'", checkpoints.CURVES, error.name)
    else:
        draw_curves(run.step_losses, run.history, output / checkpoints.CURVES)


def _restore(run: Run, state: dict[str, Any]) -> None:
    with usage_errors("--resume: the checkpoint is damaged"):
        load_full_state(state["model"], run.model)
        for saved in state["optimizer"].get("param_groups", ()):
            # What belongs to --cuda-graphs and the device, which may change.
            for name in {"capturable", "fused"} & saved.keys() & run.optimizer.defaults.keys():
                saved[name] = run.optimizer.defaults[name]
        load_full_state(state["optimizer"], run.model, run.optimizer)
        if run.ema is not None:
            load_full_state(state["model_ema"], run.ema.module)
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
        run.step_losses = state["step_losses"].tolist()
    run.epoch, run.updates, run.history = state["epoch"], state["updates"], state["history"]
    for record in run.history:
        run.note_epoch(record)


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    """The record of the first epoch with the highest test accuracy."""
    return max(history, key=lambda record: record["test_accuracy"])


def _summarize(run: Run, operators: dict[str, dict[str, str]], parameters: int) -> Result:
    best = _best(run.history)
    return Result(
        accuracy=run.history[-1]["test_accuracy"],
        best_accuracy=best["test_accuracy"],
        best_epoch=int(best["epoch"]),
        epochs=run.epoch,
        parameters=parameters,
        images_per_second=statistics.median(record["images_per_second"] for record in run.history),
        peak_memory_mb=peak_memory_mb(run.place.device),
        device=str(run.place.device),
        processes=run.place.world_size,
        fused_operators=operators,
        versions=versions(),
        step_losses=run.step_losses,
    )
