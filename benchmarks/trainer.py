"""One training loop for every victim: channels last, in bfloat16 where that is fast, resumable by epoch.

Images are poisoned before or during training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.attacks import Attack
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import bfloat16_is_fast
from calibration.fine_tuning import arrange
from guard.errors import InputError
from guard.preprocessors.affine import draw_affine, warp_torch

_BATCH = 128
_POISONED_AT_ONCE = 5_000

Poisoning = Literal["data", "training"]
"""`data`: the set is poisoned once, then trained on. `training`: the attacker trains, and poisons each augmented batch."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How to train.

    Attributes:
        epochs: Passes over the images.
        rate: Highest learning rate of AdamW; linear warm-up, then a cosine to 0.
        decay: Its weight decay.
        shift: Augmentation: of the image's size.
        rotation: In degrees.
        zoom: Relative.
        brightness: Added to pixels.
        contrast: Relative, about one half.
        flip: Left to right, for half of the images.
    """

    epochs: int
    rate: float = 2e-3
    decay: float = 5e-4
    shift: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip: bool = False


def fit(
    net: nn.Module,
    train: ImageSet,
    attack: Attack | None,
    poisoning: Poisoning,
    schedule: Schedule,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = no_progress,
) -> None:
    """Train a net in place; it ends in eval mode.

    Args:
        net: Freshly made, or to be trained further.
        train: With labels.
        attack: None for a clean net.
        poisoning: When its images are made.
        schedule: How to train.
        seed: Of everything that is drawn; each epoch draws from (seed, epoch), so that a resumed training goes on as if
            it had never stopped.
        checkpoint: A file that is rewritten after each epoch and resumed from; removed by nobody here.
        progress: Told how far it is.
    """
    labels = train.known_labels
    if attack is not None and poisoning == "data":
        train, labels = _poison_all(train, attack, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=schedule.rate, weight_decay=schedule.decay)
    per_epoch = max(1, len(train) // _BATCH)
    first = 0 if checkpoint is None or not checkpoint.is_file() else _resume(checkpoint, net, optimizer)
    arrange(net, torch.channels_last)
    net.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        for epoch in range(first, schedule.epochs):
            torch.manual_seed(_mixed(seed, epoch))
            generator = torch.Generator().manual_seed(_mixed(seed, epoch))
            order = torch.randperm(len(train), generator=generator)[: max(1, per_epoch * _BATCH)]
            for number, rows in enumerate(order.split(_BATCH)):
                images, wanted = _augment(train.images(rows), schedule, generator), labels[rows]
                if attack is not None and poisoning == "training":
                    images, wanted = attack.poison(images, wanted, generator)
                _set_rate(optimizer, schedule, (epoch * per_epoch + number) / (schedule.epochs * per_epoch))
                _step(net, optimizer, images, wanted)
                progress("training", epoch * per_epoch + number + 1, schedule.epochs * per_epoch)
            if checkpoint is not None:
                _save(checkpoint, net, optimizer, epoch + 1)
    arrange(net, torch.contiguous_format)
    net.eval()


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, wanted: Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16_is_fast()):
        loss = nn.functional.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), wanted)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, done: float) -> None:
    """A function of the share that is done, so that resuming needs no state."""
    warm_up = 0.15
    share = done / warm_up if done < warm_up else 0.5 * (1.0 + math.cos(math.pi * (done - warm_up) / (1.0 - warm_up)))
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate * max(share, 1e-3)


def _poison_all(train: ImageSet, attack: Attack, seed: int) -> tuple[ImageSet, Tensor]:
    """The whole set poisoned once, in 8 bits as a file would hold it."""
    generator = torch.Generator().manual_seed(_mixed(seed, -1))
    parts = []
    for rows in torch.randperm(len(train), generator=generator).split(_POISONED_AT_ONCE):
        images, labels = attack.poison(train.images(rows), train.known_labels[rows], generator)
        parts.append(((images * 255.0).round().to(torch.uint8), labels))
    labels = torch.cat([labels for _, labels in parts])
    return ImageSet(torch.cat([pixels for pixels, _ in parts]), labels), labels


def _augment(images: Tensor, schedule: Schedule, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    if schedule.rotation or schedule.zoom:
        images = warp_torch(
            images, draw_affine(count, height, width, schedule.shift, schedule.rotation, schedule.zoom, generator)
        )
    elif schedule.shift:
        images = _shifted(images, round(schedule.shift * height), generator)
    if schedule.flip:
        flipped = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    if schedule.brightness or schedule.contrast:
        draws = torch.rand(2, count, 1, 1, 1, generator=generator) * 2.0 - 1.0
        images = (images - 0.5) * (1.0 + draws[0] * schedule.contrast) + 0.5 + draws[1] * schedule.brightness
    return images.clamp(0.0, 1.0)


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image cut at a random place from itself padded by `most` black pixels."""
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, [most] * 4)
    tops, lefts = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = (tops[:, None] + torch.arange(height))[:, None, :, None]
    columns = (lefts[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns]


def _mixed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch + 1


def _save(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value.contiguous() for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"epochs": str(epochs)})
    partial.replace(path)


def _resume(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    try:
        with safe_open(path, "pt") as file:
            epochs = int(file.metadata()["epochs"])
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"expected a checkpoint in {path}, got another file: {error}; delete it") from error
    net.load_state_dict({name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, field = name.split(".")
            state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return epochs
