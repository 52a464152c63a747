"""The course of the learning rate: timm's schedules, and one that waits for the test figures."""

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .errors import UsageError
from .fields import flag
from .options import TrainOptions

# Options that only some schedules look at.
_OF_SCHEDULES = {
    "decay_epochs": ("step",),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "poly", "plateau"),
    "patience_epochs": ("plateau",),
    "plateau_metric": ("plateau",),
    "cooldown_epochs": ("cosine", "tanh", "poly"),
}


def check_schedule(options: TrainOptions) -> None:
    """Check that what was given for a schedule is for the one that was chosen.

    Raises:
        UsageError: it is not.
    """
    default = TrainOptions()
    for name, schedules in _OF_SCHEDULES.items():
        if options.sched not in schedules and getattr(options, name) != getattr(default, name):
            raise UsageError(f"{flag(name)} is for --sched {' or '.join(schedules)}, not for {options.sched}")
    if list(options.decay_milestones) != sorted(options.decay_milestones):
        raise UsageError(f"--decay-milestones must rise, got {' '.join(map(str, options.decay_milestones))}")
    if options.sched == "plateau" and options.decay_rate >= 1:
        raise UsageError(f"--decay-rate must be below 1 with --sched plateau, got {options.decay_rate:g}")


def create_schedule(optimizer: torch.optim.Optimizer, options: TrainOptions, updates_per_epoch: int) -> Scheduler:
    """The schedule that the options name, as a function of the number of the update."""
    if options.sched == "plateau":
        return Plateau(optimizer, options, updates_per_epoch)
    names = ["decay_epochs", "decay_milestones", "warmup_epochs", "warmup_lr", "min_lr"]
    arguments: dict[str, Any] = {name: getattr(options, name) for name in names}
    # timm's "none" would leave out warmup and the rates of the layers.
    constant = options.sched == "none"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "step" if constant else options.sched,
        decay_rate=1.0 if constant else options.decay_rate,
        num_epochs=options.epochs - options.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **arguments,
    )
    assert scheduler is not None
    return scheduler


class Plateau(StepLRScheduler):
    """A constant rate behind warmup, which falls by a factor where the test figures do not get better.

    Its state follows from the figures of the epochs, so that a run that goes on tells it those again.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: TrainOptions, updates_per_epoch: int):
        self._options = options
        self._plateau = ReduceLROnPlateau(
            torch.optim.SGD([torch.zeros(())], lr=1.0),
            mode="min" if options.plateau_metric == "loss" else "max",
            factor=options.decay_rate,
            patience=options.patience_epochs,
            threshold=0.0,
            eps=0.0,
        )
        warmup = (options.warmup_epochs or 0) * updates_per_epoch
        super().__init__(
            optimizer, decay_t=1, warmup_t=warmup, warmup_lr_init=options.warmup_lr or 0.0, t_in_epochs=False
        )

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Take note of the test figure of an epoch, counted from one."""
        if metric is not None and epoch > (self._options.warmup_epochs or 0):
            self._plateau.step(metric)

    def _get_lr(self, t: int) -> list[Any]:
        (factor,) = self._plateau.get_last_lr()
        rates = super()._get_lr(t)
        return rates if factor == 1 else [max(rate * factor, self._options.min_lr or 0.0) for rate in rates]
