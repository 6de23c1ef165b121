"""What the tests of the simpler repairs share: a net whose channels' work is known, and figures of the digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.data import ImageSet
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Part, Parts, clean_parts
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.predictors import wrap
from tests.calibration.repair.conftest import SPEC as DIGITS
from tests.toy import SPEC, toy_images

QUADRANT, DEAD, FAINT, SOUTH_EAST, NORTH_WEST = range(5)


class Channels(nn.Module):
    """The brightest quadrant wins, by channel 0; white pixels in one corner mean class 0, in the opposite one class 1.

    Channel 1 is never active, channel 2 hardly, and without any use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 5, 4, stride=4), nn.Linear(20, 4)
        with torch.no_grad():
            for value in self.parameters():
                value.zero_()
            self.convolution.weight[QUADRANT] = 1.0 / 16.0
            bias = self.convolution.bias
            assert bias is not None
            bias[DEAD] = -1.0
            self.convolution.weight[FAINT] = 0.01 / 16.0
            self.convolution.weight[SOUTH_EAST, 0, 2:, 2:] = 10.0
            self.convolution.weight[NORTH_WEST, 0, :2, :2] = 10.0
            bias[SOUTH_EAST:] = -39.0
            heard = self.linear.weight.view(4, 5, 4)
            heard[:, QUADRANT] = 12.0 * torch.eye(4)
            heard[0, SOUTH_EAST, 3] = heard[1, NORTH_WEST, 0] = 100.0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(self.convolution(images).relu().flatten(1))
        return out


def toy_parts(predictor: Predictor, count: int = 120) -> Parts:
    images, labels = toy_images(count)
    return clean_parts(ImageSet((images * 255.0).round().to(torch.uint8), labels), predictor, 0)


def toy_predictor(net: nn.Module | None = None) -> Predictor:
    return Predictor(wrap(net or Channels()), SPEC, 4, "logits")


def corner_triggers(*labels: int) -> Triggers:
    """White corners, as if recovered: for 0 in the south-east, for 1 in the north-west."""
    masks = torch.zeros(len(labels), 8, 8)
    for row, label in enumerate(labels):
        place = slice(-2, None) if label == 0 else slice(0, 2)
        masks[row, place, place] = 1.0
    count = len(labels)
    return Triggers(
        torch.tensor(labels),
        torch.full((count,), -1),
        masks,
        torch.ones(count, 1, 8, 8),
        torch.ones(count),
        torch.zeros(count, dtype=torch.int64),
    )


def digit_predictor(net: nn.Module) -> Predictor:
    return Predictor(wrap(net), DIGITS, 10, "logits")


def accuracy(predictor: Predictor, digits: Digits) -> float:
    """On the test images."""
    return _share(predictor, digits.test.images(slice(None)), digits.test.known_labels)


def success(predictor: Predictor, digits: Digits) -> float:
    """Of the true trigger, on the test images."""
    images = digits.triggered.images(slice(None))
    return _share(predictor, images, torch.full((len(images),), ATTACK.target_label))


def _share(predictor: Predictor, images: Tensor, wanted: Tensor) -> float:
    return float((predictor(images).argmax(dim=1) == wanted).double().mean())


def first(part: Part, count: int) -> Part:
    return Part(part.images[:count], part.labels[:count], part.answers[:count])
