"""The papers' small architectures, for images in [0, 1]; widths are adjustable."""

from __future__ import annotations

from torch import Tensor, nn


class Normalise(nn.Module):
    """(x - mean) / std, so that the model takes images in [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def mnist_conv(width: int = 16) -> nn.Sequential:
    """Two convolutions with pooling, two dense layers; (B, 1, 28, 28) to (B, 10)."""
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
        nn.Linear(128, 10),
    )


def gtsrb_six_conv(width: int = 16) -> nn.Sequential:
    """CoDefend's 6 convolutions, 3 poolings, 4 dropouts and 2 dense layers, with batch norm; (B, 3, 32, 32) to (B, 43)."""
    layers: list[nn.Module] = [Normalise(0.33, 0.27)]
    channels = 3
    for block in range(3):
        out = width << block
        for _ in range(2):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers += [nn.MaxPool2d(2), nn.Dropout(0.2)]
    head = [nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 43)]
    return nn.Sequential(*layers, *head)
