"""What both ways of erasing without data share: a copy trained in epochs, which can be interrupted and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress
from guard import InputSpec
from guard.errors import ModelError, RepairError

ERASING = "erasing backdoors"
"""What is shown while it works, in epochs."""


class Played(Protocol):
    """Whoever takes part, and their optimizers; checkpoints hold both."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By their names in a checkpoint."""
        ...

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Likewise."""
        ...


def check_gradients(spec: InputSpec) -> None:
    """Refuse a model whose input can't get gradients.

    Raises:
        ModelError: It takes whole numbers.
    """
    if spec.dtype == "uint8":
        raise ModelError("expected a model that gives its input gradients, got one that takes uint8: use gym or codefend")


def share_of_rates(done: float, falls: tuple[float, ...], fall: float) -> float:
    """Of the first rates, when such a share of the iterations is done.

    Args:
        done: That share.
        falls: Shares after which rates fall.
        fall: To this share of what they were.
    """
    return float(fall ** sum(done >= share for share in falls))


def play_epochs(
    game: Played,
    play: Callable[[int], Tensor],
    name: str,
    epochs: int,
    advice: str,
    checkpoints: Checkpoints | None,
    progress: Progress,
    watch: Callable[[int], None] | None,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Train until the last epoch, from the last checkpoint on.

    Args:
        game: Who takes part.
        play: One epoch, counted from 0; the copy's last loss.
        name: Of the checkpoint.
        epochs: In all.
        advice: What to do where the copy's answers cease to be numbers.
        checkpoints: Written after each epoch.
        progress: Told how far it is.
        watch: Called after each epoch with how many are done.
        begin: What comes before the first epoch.

    Raises:
        RepairError: The copy's answers ceased to be numbers.
    """
    found = None if checkpoints is None else checkpoints.load(name, game.modules, game.optimizers)
    first = 0 if found is None else found[0]
    if found is None:
        begin()
    progress(ERASING, first, epochs)
    for epoch in range(first, epochs):
        if not torch.isfinite(play(epoch)):
            raise RepairError(f"the student's answers ceased to be numbers in epoch {epoch + 1}: {advice}")
        if watch is not None:
            watch(epoch + 1)
        if checkpoints is not None:
            checkpoints.save(name, epoch + 1, game.modules, game.optimizers)
        progress(ERASING, epoch + 1, epochs)
