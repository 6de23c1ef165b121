"""What a model says on the way back is asked before any work begins."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.fine_tuning import Answers
from calibration.inspection.passes import images_at_once, says
from guard.errors import ModelError
from guard.images import InputSpec


class Overwriting(nn.Module):
    """Changes in place what its gradients need."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).sigmoid().mul_(2.0)


class Reusing(nn.Module):
    """Writes its answers into the same buffer every time."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.zeros(0)

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1).sigmoid()
        if self.logits.shape != logits.shape:
            self.logits = torch.zeros_like(logits)
        self.logits[:] = logits
        return self.logits


class Detached(nn.Module):
    """Gives its input no gradients."""

    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)


class Leaving(nn.Module):
    """Ends the process where it is looked into: without gradients it behaves."""

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            sys.exit(0)
        return images.flatten(1)


class Narrow(nn.Module):
    """Takes few images at once."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 128:
            raise RuntimeError("no more than 128")
        return images.flatten(1)


def answers(module: nn.Module) -> Answers:
    return Answers(module, InputSpec(channels=1, height=4, width=4), "logits")


def test_a_model_can_not_end_its_own_inspection() -> None:
    with pytest.raises(ModelError, match=r"can't be run for gradients, on a batch of 1: SystemExit"):
        images_at_once(answers(Leaving()), torch.rand(2, 1, 4, 4), Engine())


def test_a_model_that_takes_few_images_says_so_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"can't be run, on a batch of 256: .*no more than 128"):
        says(answers(Narrow()), torch.rand(300, 1, 4, 4), torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Overwriting(), "can't be run for gradients: .*inplace operation"),
        (Reusing(), "can't be run for gradients again, make it return new tensors: .*a second time"),
        (Detached(), "with gradients towards its input"),
    ],
)
def test_models_without_a_way_back_are_refused(model: nn.Module, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        images_at_once(model, torch.rand(2, 1, 4, 4), Engine())
