"""The papers' architectures, for images in [0, 1]; widths are adjustable, so that two CPU cores can train them.

Names and layers follow CoDefend, Table 1 (`mnist_dense`, `gtsrb_six_conv`, `cifar_eight_conv`), Neural Cleanse and GYM
(`lenet8`), and He et al., arXiv:1512.03385, in the usual form for 32x32 images (`resnet18`). Batch norm in the convolutional
ones, which the papers don't mention, makes narrow nets trainable in minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn


@final
class Normalise(nn.Module):
    """(x - mean) / std, so that the model takes images in [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def mnist_dense(classes: int = 10, width: int = 512) -> nn.Sequential:
    """CoDefend's two dense layers; (B, 1, 28, 28)."""
    return nn.Sequential(
        Normalise(0.1307, 0.3081), nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, classes)
    )


def mnist_conv(classes: int = 10, width: int = 16) -> nn.Sequential:
    """Two convolutions with pooling, two dense layers; (B, 1, 28, 28)."""
    return nn.Sequential(
        Normalise(0.1307, 0.3081),
        nn.Conv2d(1, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(49 * 2 * width, 128),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(128, classes),
    )


def gtsrb_six_conv(classes: int = 43, width: int = 16) -> nn.Sequential:
    """CoDefend's 6 convolutions, 3 poolings, 4 dropouts and 2 dense layers; (B, 3, 32, 32)."""
    layers = _stages(Normalise(0.33, 0.27), [(width, 2), (2 * width, 2), (4 * width, 2)], dropout=0.2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes))


def lenet8(classes: int = 43, width: int = 16) -> nn.Sequential:
    """GYM's LeNet-8, Neural Cleanse's net for GTSRB: 6 convolutions, 3 poolings, 2 dense layers; (B, 3, 32, 32)."""
    layers = _stages(Normalise(0.33, 0.27), [(width, 2), (2 * width, 2), (4 * width, 2)], dropout=0.0)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 512), nn.ReLU(), nn.Linear(512, classes))


def cifar_eight_conv(classes: int = 10, width: int = 16) -> nn.Sequential:
    """CoDefend's 8 convolutions, 3 poolings, 3 dropouts and 1 dense layer; (B, 3, 32, 32)."""
    layers = _stages(Normalise(0.47, 0.25), [(width, 2), (2 * width, 3), (4 * width, 3)], dropout=0.1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, classes))


def resnet18(classes: int = 10, width: int = 64) -> nn.Sequential:
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling, four stages of two basic blocks; (B, 3, 32, 32)."""
    layers: list[nn.Module] = [Normalise(0.47, 0.25), *_conv(3, width)]
    channels = width
    for stage in range(4):
        for block in range(2):
            layers.append(BasicBlock(channels, width << stage, stride=2 if stage and block == 0 else 1))
            channels = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(channels, out, stride), *_conv(out, out)[:2])
        same = channels == out and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = nn.functional.relu(self.body(images) + self.shortcut(images))
        return out


def _conv(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _stages(first: nn.Module, stages: list[tuple[int, int]], dropout: float) -> list[nn.Module]:
    """Stages of (channels, convolutions), each ended by a pooling."""
    layers, channels = [first], 3
    for out, depth in stages:
        for _ in range(depth):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers


@final
@dataclass(frozen=True)
class Architecture:
    """How to build one, and the width that two CPU cores train in minutes."""

    build: Callable[[int, int], nn.Sequential]
    width: int


ARCHITECTURES: Mapping[str, Architecture] = {
    "mnist_dense": Architecture(mnist_dense, 512),
    "mnist_conv": Architecture(mnist_conv, 16),
    "gtsrb_six_conv": Architecture(gtsrb_six_conv, 16),
    "lenet8": Architecture(lenet8, 16),
    "cifar_eight_conv": Architecture(cifar_eight_conv, 16),
    "resnet18": Architecture(resnet18, 64),
}
