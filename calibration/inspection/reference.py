"""A clean model of the same task: a small net that learns which labels clean images have, and nothing else of the suspect.

Some labels are easy to reach by nature, in any model of a task. Clean images never carry the trigger, so that a net which
learns their labels, or the suspect's answers to them, learns what is natural, and not the backdoor. What needs a small trigger
in the suspect, but not in the net, is no matter of the task.

It learns labels, not the suspect's probabilities: these carry the backdoor over. On digits, a net that was distilled from them
answered 99% of triggered images with the target, without ever having seen a trigger; one that learnt the labels none.

Reference: Zhang et al., mixup, arXiv:1710.09412.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import arrange

_LARGEST = 32  # pixels: larger images are halved first, until they fit
_WIDTHS = (24, 48, 96)
_BATCH, _STEPS = 64, 640
_NAME = "reference-net"  # of its checkpoint
_RATE, _WARM_UP = 3e-3, 0.1
_MIXED = 0.5  # share of the images that are mixtures of two
_SHIFT = 1.0 / 14.0  # of the image's size


@final
class ReferenceNet(nn.Module):
    """Three stages of two convolutions, then the classes.

    Args:
        shape: (C, H, W) of the images.
        classes: M.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        while max(height, width) > _LARGEST:
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
            height, width = -(-height // 2), -(-width // 2)
        for out in _WIDTHS:
            for _ in range(2):
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            height, width = -(-height // 2), -(-width // 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to logits (B, M)."""
        answers: Tensor = self.layers((images - 0.5) / 0.25)
        return answers


def train_reference(
    images: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    engine: Engine,
    progress: Progress = no_progress,
    checkpoints: Checkpoints | None = None,
) -> nn.Module:
    """Train one.

    Args:
        images: (N, C, H, W), in [0, 1], clean.
        labels: (N,), int64: true ones or, where they are unknown, the suspect's answers.
        classes: M.
        seed: Of its first weights and of what is drawn.
        engine: Where.
        progress: Told how far it is.
        checkpoints: Where it is kept once it is trained, and taken from.

    Returns:
        The net, in eval mode, without gradients to its weights.
    """
    _, channels, height, width = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ReferenceNet((channels, height, width), classes)
    if checkpoints is None or checkpoints.load(_NAME, {"net": net}) is None:
        _train(net, images, labels, classes, seed, engine, progress)
        if checkpoints is not None:
            checkpoints.save(_NAME, _STEPS, {"net": net})
    net = engine.place(net).eval()
    arrange(net, torch.channels_last)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net


def _train(net: nn.Module, images: Tensor, labels: Tensor, classes: int, seed: int, engine: Engine, progress: Progress) -> None:
    arrange(net, torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE)
    module, optimizer_there = engine.setup(net, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, _STEPS, pct_start=_WARM_UP, anneal_strategy="linear", cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    wanted = nn.functional.one_hot(labels, classes).float()
    net.train()
    for step in range(_STEPS):
        rows = torch.randint(len(images), (min(_BATCH, len(images)),), generator=generator)
        batch, answers = _mixed(_shifted(images[rows], generator), wanted[rows], generator)
        batch = batch.to(engine.device).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        engine.backward(nn.functional.cross_entropy(module(batch).float(), answers.to(engine.device)))
        optimizer_there.step()
        schedule.step()
        progress("training a clean reference", step + 1, _STEPS)


def _mixed(images: Tensor, answers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of the images mixed with others, (B, C, H, W), and their answers alike, (B, M)."""
    mixed = torch.rand(len(images), generator=generator) < _MIXED
    own = torch.where(mixed, torch.rand(len(images), generator=generator), 1.0)
    others = torch.randperm(len(images), generator=generator)
    share = own.view(-1, 1, 1, 1)
    together = share * images + (1.0 - share) * images[others]
    return together, own.unsqueeze(1) * answers + (1.0 - own.unsqueeze(1)) * answers[others]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """All of a batch moved alike by a few pixels, edges repeated."""
    height, width = images.shape[2:]
    most = [max(1, round(_SHIFT * size)) for size in (height, width)]
    down, right = (int(torch.randint(0, 2 * limit + 1, (1,), generator=generator)) for limit in most)
    padded = nn.functional.pad(images, [most[1], most[1], most[0], most[0]], mode="replicate")
    return padded[:, :, down : down + height, right : right + width]
