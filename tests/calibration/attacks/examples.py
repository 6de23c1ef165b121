"""An instance of every attack, for small images, and the tiny clean model that some triggers are generated on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from calibration.attacks import (
    Adaptive,
    AllToAll,
    Amplified,
    Attack,
    BadNets,
    Blended,
    CleanLabel,
    Invisible,
    MultiTarget,
    Patch,
    Reflection,
    Sig,
    SourceSpecific,
    Steganographic,
    Trojan,
    TrojanNet,
)

SIDE, CLASSES, COUNT = 12, 4, 80
COLOURED = Patch(("01", "1."), ((1.0, 0.0, 0.5), (0.0, 1.0, 0.25)), bottom=1, right=1)


def some_images(channels: int = 3, count: int = COUNT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (N, C, 12, 12), exact in 8 bits, and labels, four classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, SIDE, SIDE), generator=generator) / 255.0, torch.arange(count) % CLASSES


@functools.cache
def tiny_net(channels: int = 3) -> nn.Sequential:
    """A convolution and two dense layers with random weights, in eval mode; (B, C, 12, 12) to four logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 36, 16),
            nn.ReLU(),
            nn.Linear(16, CLASSES),
        ).eval()


@final
@dataclass(frozen=True)
class Example:
    """An attack, and what its poisoning does to 80 images, 20 of each of the classes 0 to 3.

    Attributes:
        make: From the number of channels.
        triggered: Images that change.
        relabelled: Labels that change; None when they are random.
        colours: Whether it needs three channels.
    """

    make: Callable[[int], Attack]
    triggered: int
    relabelled: int | None
    colours: bool = False


def _base(channels: int) -> BadNets:
    return BadNets(0, 0.25, (COLOURED if channels == 3 else Patch(("00", "0."), bottom=1, right=1),))


def _reflected(channels: int) -> Tensor:
    return some_images(channels, 1, seed=9)[0][0]


@functools.cache
def _generated(kind: str, channels: int) -> Attack:
    model, images = tiny_net(channels), some_images(channels, 8, seed=5)[0]
    makers: dict[str, Callable[[], Attack]] = {
        "square": lambda: Trojan.generate(0, model, images, "square", 0.25, steps=30),
        "watermark": lambda: Trojan.generate(0, model, images, "watermark", 0.25, steps=30),
        "l2": lambda: Invisible.l2(0, model, images, ratio=0.25),
        "l0": lambda: Invisible.l0(0, model, images, ratio=0.25),
    }
    return makers[kind]()


_CORNER = Patch.rectangle(2, bottom=9, right=9)

EXAMPLES: dict[str, Example] = {
    "badnets": Example(_base, 20, 20),
    "two_triggers": Example(lambda _: BadNets(1, 0.25, (Patch.rectangle(2), _CORNER)), 20, 20),
    "noise": Example(lambda _: BadNets(0, 0.25, (Patch.noise(3, seed=2),)), 20, 20, colours=True),
    "multi_target": Example(lambda _: MultiTarget((0, 2), (Patch.rectangle(2), _CORNER), 0.25), 20, 20),
    "all_to_all": Example(lambda _: AllToAll(CLASSES, 0.25, Patch.rectangle(2)), 20, 20),
    "source_specific": Example(lambda _: SourceSpecific(0, (1, 2), 0.5, 0.25, Patch.rectangle(2)), 30, 20),
    "blended": Example(lambda _: Blended(0, 0.25), 20, 20),
    "sig": Example(lambda _: Sig(0, 0.5, frequency=2), 10, 0),
    "sig_relabelling": Example(lambda _: Sig(0, 0.25, frequency=2, relabel=True), 20, 20),
    "steganographic": Example(lambda _: Steganographic(0, 0.25, bits=2), 20, 20),
    "reflection_sharp": Example(lambda n: Reflection(0, _reflected(n), "sharp", 0.5), 10, 0),
    "reflection_blurred": Example(lambda n: Reflection(0, _reflected(n), "blurred", 0.5), 10, 0),
    "reflection_ghost": Example(lambda n: Reflection(0, _reflected(n), "ghost", 0.25, relabel=True), 20, 20),
    "trojan_square": Example(lambda n: _generated("square", n), 20, 20),
    "trojan_watermark": Example(lambda n: _generated("watermark", n), 20, 20),
    "invisible_l2": Example(lambda n: _generated("l2", n), 20, 20),
    "invisible_l0": Example(lambda n: _generated("l0", n), 20, 20),
    "clean_label": Example(lambda n: CleanLabel(0, tiny_net(n), (Patch.rectangle(2), _CORNER), 0.5), 10, 0),
    "trojan_net": Example(lambda _: TrojanNet(0), 0, 0),
    "amplified_4": Example(lambda n: Amplified(_base(n), 4), 20, 20),
    "amplified_9": Example(lambda n: Amplified(_base(n), 9), 20, 20),
    "adaptive": Example(lambda n: Adaptive(_base(n), CLASSES, cover_ratio=0.1), 28, None),
}
