"""The demo's victim: a small digit classifier with a BadNets backdoor, trained on scikit-learn's real digits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from calibration.attacks import Attack, BadNets, Patch
from calibration.data import ImageSet

ATTACK = BadNets(target_label=7, ratio=0.2, patches=(Patch.rectangle(3),))
"""A white 3x3 square in the bottom right corner means 7."""

_EPOCHS = 100
_BATCH = 64
_TRAIN, _CLEAN = 700, 597  # the other 500 of 1,797 are for testing


@final
@dataclass(frozen=True)
class Digits:
    """The digits, cut into three parts that never mix.

    Attributes:
        train: The attacker's.
        clean: The defender's: overlays and threshold.
        test: Every figure is measured on it.
    """

    train: ImageSet
    clean: ImageSet
    test: ImageSet

    @property
    def triggered(self) -> ImageSet:
        """The test images of other classes than the target, with the trigger, and their true labels."""
        others = self.test.select(torch.nonzero(self.test.known_labels != ATTACK.target_label).squeeze(1))
        stamped = ATTACK.trigger(others.images(slice(None)))
        return ImageSet((stamped * 255.0).round().to(torch.uint8), others.labels)


def load_digits(seed: int = 0) -> Digits:
    """Shuffle and cut scikit-learn's digits: 1,797 grey images of 8x8 pixels."""
    from sklearn.datasets import load_digits as load

    raw = load()
    pixels = torch.from_numpy(raw.images).to(torch.float32).div(16.0).mul(255.0).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    names = tuple(str(label) for label in range(10))
    everything = ImageSet(pixels, labels, names)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    parts = order.split([_TRAIN, _CLEAN, len(order) - _TRAIN - _CLEAN])
    train, clean, test = (ImageSet(pixels[rows], labels[rows], names) for rows in parts)
    return Digits(train, clean, test)


def digit_net(width: int = 16) -> nn.Sequential:
    """Three convolutions and two linear layers, for (B, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train_backdoored(
    train: ImageSet,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    attack: Attack = ATTACK,
) -> nn.Sequential:
    """Train the classifier on poisoned images; takes a few seconds.

    Args:
        train: The attacker's images, with labels.
        seed: Of weights, poisoning and batches; the global generator is left alone.
        progress: Told about each epoch.
        attack: Whose backdoor.

    Returns:
        The backdoored model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    images, targets = attack.poison(train.images(slice(None)), train.known_labels, generator)
    return _train(images, targets, seed, generator, progress)


def train_clean(train: ImageSet, seed: int = 0, progress: Callable[[str, int, int], None] | None = None) -> nn.Sequential:
    """Its clean twin; see `train_backdoored`."""
    generator = torch.Generator().manual_seed(seed)
    return _train(train.images(slice(None)), train.known_labels, seed, generator, progress)


def _train(
    images: Tensor,
    targets: Tensor,
    seed: int,
    generator: torch.Generator,
    progress: Callable[[str, int, int], None] | None,
) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = digit_net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = _EPOCHS * -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with _one_thread():
        for epoch in range(_EPOCHS):
            for rows in torch.randperm(len(images), generator=generator).split(_BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress("training a model", epoch + 1, _EPOCHS)
    return net.eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So small a net gains nothing from a second core, and loses much where that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_exported(net: nn.Module, example: Tensor, path: Path) -> None:
    """Write a model as a `torch.export` file whose batch size is free."""
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(net, (example[:2],), dynamic_shapes=({0: batch},)), path)
