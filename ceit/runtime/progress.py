"""Progress on the terminal, and the losses of an epoch."""

import math
import sys

import torch
from torch import Tensor
from tqdm import tqdm

# Reading a number off a GPU waits for all that was queued before it: not at every step.
_STEPS_BETWEEN_READINGS = 10


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def progress_bar(images: int | None, description: str, visible: bool) -> tqdm:
    """A progress bar that counts images and vanishes at its end; into a file it is written rarely.

    Args:
        images: how many make it full; None if nobody knows.
        description: what stands before it.
        visible: whether it is shown at all.
    """
    return tqdm(
        total=images,
        desc=description,
        unit=" images",
        disable=not visible,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
        dynamic_ncols=True,
    )


class EpochProgress:
    """Losses and accuracy of an epoch, shown on a progress bar.

    Args:
        bar: a bar from `progress_bar`.

    Attributes:
        losses: one loss for each step that was read so far.
    """

    def __init__(self, bar: tqdm):
        self.losses: list[float] = []
        self._bar = bar
        self._pending: list[Tensor] = []
        self._correct: Tensor | int = 0
        self._images = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Record a step: its loss (scalar), logits (B, classes) and labels (B,)."""
        self._pending.append(loss.detach())
        self._correct = self._correct + (logits.argmax(1) == targets).sum()
        self._images += len(targets)
        self._bar.update(len(targets))
        if len(self._pending) == _STEPS_BETWEEN_READINGS:
            self.read()

    def read(self) -> None:
        """Fetch what is pending from the device and show it.

        Raises:
            TrainingFailed: a loss is infinite or not a number.
        """
        if not self._pending:
            return
        losses = torch.stack(self._pending).tolist()
        self._pending.clear()
        for loss in losses:
            self.losses.append(loss)
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"the loss of step {len(self.losses)} of this epoch is {loss}: try a lower --lr, a longer warmup, "
                    "--clip-grad 1, or --amp none or bfloat16 instead of float16"
                )
        accuracy = 100 * float(self._correct) / self._images
        self._bar.set_postfix_str(f"loss {losses[-1]:.3f}, accuracy {accuracy:.1f}%")
