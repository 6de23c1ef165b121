"""Plain fine-tuning on clean images: the baseline of most papers, and a first step of other repairs.

    loss = CE(f(t(x)), y)

y are the true labels or, where there are none, the original's answers. t shifts an image by up to an eighth of its side, over
black, and mirrors it where the original bears that, as papers do. It is what makes the copy forget: without it, no gradient
reaches weights that only a trigger excites, such as those that look at a corner which is black in every clean image. The epoch
that is kept is chosen on images that are moved so too (ours): on images as they are, the first epochs always do best.

A trigger may survive all the same, above all where there are few images.

Batch norm keeps its statistics, so that a few images are enough; in the papers it takes them from the batches, as it does here
with `batch_statistics`.

References: Liu et al., Fine-Pruning, arXiv:1805.12185; Yan et al., DHBE, arXiv:2306.08009, appendix C; Li et al.,
NAD, arXiv:2101.05930, whose public code shifts by 4 of 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Part, Parts
from calibration.repair.gym import bears_flips
from calibration.repair.tuning import Lesson, Loss, Tuning, likeness, tune
from guard import Predictor
from guard.errors import RepairError

PAPER = Tuning(epochs=20, rate=0.01, batch=64, weight=0.0, mixed=0.0, optimizer="sgd", batch_statistics=True)
"""DHBE's rival, tuned with 2,000 images; there the rate falls in two steps, here linearly."""

OURS = Tuning(epochs=60, rate=3e-3, warm_up=0.2, decay=1e-2, weight=0.0, mixed=0.0)

_MOVED = 4  # times that each image is moved to say when to stop


class FineTuning(msgspec.Struct, frozen=True, kw_only=True):
    """How to fine-tune on clean images.

    Attributes:
        tuning: `OURS` or `PAPER`, with changes.
        shift: Furthest that images are shifted, as a share of their side; 0 for not at all.
        flips: Whether half of them are mirrored; None for where the original bears it.
    """

    tuning: Tuning = OURS
    shift: float = 0.125
    flips: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 <= self.shift < 1.0:
            raise RepairError(f"expected a shift of 0 or more and less than 1, a share of the image's side, got {self.shift}")


def repair_by_fine_tuning(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    settings: FineTuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
    *,
    name: str = "tuning",
    loss: Loss | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Fine-tune a copy in place; it ends with the weights that did best on the stopping part.

    Args:
        copied: The copy.
        original: The model.
        clean: Cut.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.
        name: Of the checkpoints.
        loss: Another than the cross-entropy, see `tune`.
        after_step: See `tune`.

    Raises:
        ModelError: The model can't be trained.
    """
    tuning = settings.tuning
    moves = Moves.of(settings, original, clean.tuning)
    shown = moves.beside(clean.stopping, seed)
    tune(
        copied,
        lambda epoch: moves.lessons(clean.tuning, tuning.batch, seed * 1_000_003 + epoch + 1),
        batches(clean.tuning, tuning.batch),
        tuning,
        engine,
        lambda: likeness(copied.predictor, shown.images, shown.answers, shown.labels, tuning),
        checkpoints,
        name,
        progress,
        loss,
        after_step,
    )


@final
@dataclass(frozen=True)
class Moves:
    """What is done to images at random.

    Attributes:
        shift: Furthest, as a share of each side.
        flips: Whether half of them are mirrored.
    """

    shift: float
    flips: bool

    @classmethod
    def of(cls, settings: FineTuning, original: Predictor, part: Part) -> Moves:
        """Those that settings ask for; some images tell whether the original bears flips."""
        return cls(settings.shift, bears_flips(original, part) if settings.flips is None else settings.flips)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Move images, (B, C, H, W)."""
        moved = shifted(images, self.shift, generator)
        if not self.flips:
            return moved
        chosen = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(chosen.view(-1, 1, 1, 1), moved.flip(-1), moved)

    def lessons(self, part: Part, batch: int, seed: int) -> Iterator[Lesson]:
        """An epoch's batches of moved images, about equally large: batch norm can't take statistics from a small rest."""
        generator = torch.Generator().manual_seed(seed)
        for rows in torch.randperm(len(part), generator=generator).tensor_split(batches(part, batch)):
            yield Lesson(self(part.images[rows], generator), part.answers[rows], part.labels[rows])

    def beside(self, part: Part, seed: int) -> Part:
        """A part as it is, and moved a few times."""
        if self.shift == 0.0 and not self.flips:
            return part
        generator, times = torch.Generator().manual_seed(seed), 1 + _MOVED
        images = torch.cat([part.images, *(self(part.images, generator) for _ in range(_MOVED))])
        return Part(images, part.labels.repeat(times), part.answers.repeat(times, 1))


def batches(part: Part, batch: int) -> int:
    """In an epoch."""
    return -(-len(part) // batch)


def shifted(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Shift each image by its own whole number of pixels, over black.

    Args:
        images: (B, C, H, W).
        share: Furthest, as a share of each side.
        generator: Draws.
    """
    count, _, height, width = images.shape
    down, across = round(share * height), round(share * width)
    padded = nn.functional.pad(images, (across, across, down, down))
    top = torch.randint(2 * down + 1, (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(2 * across + 1, (count, 1), generator=generator) + torch.arange(width)
    rows = torch.arange(count).view(-1, 1, 1)
    return padded.transpose(0, 1)[:, rows, top.unsqueeze(2), left.unsqueeze(1)].transpose(0, 1)
