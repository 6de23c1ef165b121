"""Model inversion: images that a model gives each label, recovered from the model alone, by gradient descent from noise.

    minimise  max(0, m - (f_t(x) - max_other f(x))) + a TV(x) + b |x - grey|_2^2    over the image x in [0, 1]^(C, H, W)

Each image begins as a faint noise around a grey level of its own, which it is drawn back to, and moves by a few pixels from
step to step. So it says little besides its label, wherever a model's backgrounds are dark, bright or in between; and the hinge
(ours) asks for no more certainty than the model has of clean images.

Reference: Fredrikson et al., Model Inversion Attacks that Exploit Confidence Information, CCS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from guard.errors import CalibrationError

_JITTER = 1 / 16  # of an image's side: how far it moves at most
_FAINT = 0.02  # noise at the start
_BYTES = 1 << 30  # of recovered images


class Inversion(msgspec.Struct, frozen=True, kw_only=True):
    """How to recover images.

    Attributes:
        images: For each label; fewer where they would take more than a gibibyte.
        steps: Of Adam, for each image.
        rate: Its rate at first; it falls to 0.
        margin: m, by how much the label's logit is to exceed the others, in nats.
        smooth: a, weight of the total variation, a pixel.
        near: b, weight of the squared distance from the grey level, a pixel.
    """

    images: int = 10
    steps: int = 100
    rate: float = 0.05
    margin: float = 3.0
    smooth: float = 10.0
    near: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if min(self.images, self.steps) < 1:
            raise CalibrationError(f"expected at least one image and one step, got {self.images} and {self.steps}")


def invert(
    answers: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    settings: Inversion,
    seed: int,
    engine: Engine,
    at_once: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Images that the model gives each label, recovered from it.

    Args:
        answers: The model.
        shape: (C, H, W).
        classes: K.
        settings: How.
        seed: Of the draws; an image does not depend on those beside it.
        engine: Where.
        at_once: Images that may be in a forward pass.
        checkpoints: Written after each batch, and gone on from.
        progress: Told how far it is.

    Returns:
        (K, n, C, H, W), in [0, 1], on the CPU.
    """
    pixels = shape[0] * shape[1] * shape[2]
    count = max(1, min(settings.images, _BYTES // (4 * pixels * classes)))
    wanted = torch.arange(classes).repeat_interleave(count)
    images = torch.empty(classes * count, *shape)
    for rows in torch.arange(len(wanted)).split(at_once):
        name = f"inversion-{int(rows[0])}"
        saved = None if checkpoints is None else checkpoints.load(name)
        if saved is not None and len(saved[1]["images"]) == len(rows):
            images[rows] = saved[1]["images"]
        else:
            images[rows] = _recovered(answers, wanted[rows], rows, shape, settings, seed, engine)
            if checkpoints is not None:
                checkpoints.save(name, 1, arrays={"images": images[rows]})
        progress("recovering images", int(rows[-1]) + 1, len(wanted))
    return images.view(classes, count, *shape)


def _recovered(
    answers: nn.Module,
    wanted: Tensor,
    numbers: Tensor,
    shape: tuple[int, int, int],
    settings: Inversion,
    seed: int,
    engine: Engine,
) -> Tensor:
    """Some of the images, (B, C, H, W), on the CPU; `numbers`, (B,), says where each one's noise begins."""
    generators = [generator_of(seed, number) for number in numbers.tolist()]
    grey = torch.stack([torch.rand(1, 1, 1, generator=generator) for generator in generators]).to(engine.device)
    noise = torch.stack([torch.rand(shape, generator=generator) - 0.5 for generator in generators]).to(engine.device)
    images = (grey + _FAINT * noise).clamp(0.0, 1.0).requires_grad_(True)
    wanted = wanted.to(engine.device)
    optimizer = torch.optim.Adam([images], lr=settings.rate)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.rate * (1.0 - step / settings.steps)
        optimizer.zero_grad(set_to_none=True)
        with engine.autocast():
            logits = answers(_moved(images, generator_of(seed, step))).float()
        lacking = (settings.margin - _margins(logits, wanted)).clamp_min(0.0)
        away = (images - grey).square().mean(dim=(1, 2, 3))
        loss = (lacking + settings.smooth * total_variation(images) + settings.near * away).sum()
        loss.backward(inputs=[images])
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    return images.detach().cpu()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and across; (B, C, H, W) to (B,)."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return (down.sum(dim=(1, 2, 3)) + across.sum(dim=(1, 2, 3))) / images[0].numel()


def _margins(logits: Tensor, wanted: Tensor) -> Tensor:
    """By how much the wanted label's logit exceeds the largest other one, (B,)."""
    rows = wanted.unsqueeze(1)
    return logits.gather(1, rows).squeeze(1) - logits.scatter(1, rows, float("-inf")).amax(dim=1)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """All of them by the same few pixels, what leaves on one side enters on the other."""
    most = [max(1, round(_JITTER * side)) for side in images.shape[2:]]
    shifts = [int(torch.randint(-reach, reach + 1, (), generator=generator)) for reach in most]
    return images.roll(shifts, dims=(2, 3))


@final
@dataclass(frozen=True)
class Pool:
    """Recovered images, in the order of the labels that the model gives them.

    Attributes:
        images: (N, C, H, W).
        own: (N,), int64, sorted.
    """

    images: Tensor
    own: Tensor

    @classmethod
    def of(cls, images: Tensor, own: Tensor) -> Pool:
        """Of images (N, C, H, W) that the model gives these labels, (N,), which differ."""
        if bool((own == own[0]).all()):
            what = f"label {int(own[0])} for all {len(own)} recovered images"
            raise CalibrationError(f"expected a model that gives several labels, got {what}: check --mean, --std, --output")
        order = own.argsort(stable=True)
        return cls(images[order], own[order])

    def draw(self, labels: Tensor, draws: Tensor) -> Tensor:
        """Numbers from 0 to 1, (K, B), to rows of images that don't get the label, (K, B)."""
        first = torch.searchsorted(self.own, labels)
        skipped = torch.searchsorted(self.own, labels, right=True) - first
        chosen = (draws.to(self.own.device) * (len(self.own) - skipped).unsqueeze(1)).long()
        return chosen + (chosen >= first.unsqueeze(1)) * skipped.unsqueeze(1)


@torch.no_grad()
def labels_of(answers: nn.Module, images: Tensor, at_once: int) -> Tensor:
    """That a model gives images, (B,), int64."""
    return torch.cat([answers(part).argmax(dim=1) for part in images.split(at_once)])


def generator_of(seed: int, number: int = 0) -> torch.Generator:
    """For the draws of one step, image or label."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
