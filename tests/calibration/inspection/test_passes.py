"""What a model says on the way back is asked before any work begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.inspection.passes import images_at_once
from guard.errors import ModelError


class Overwriting(nn.Module):
    """Changes in place what its gradients need."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).sigmoid().mul_(2.0)


class Detached(nn.Module):
    """Gives its input no gradients."""

    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)


@pytest.mark.parametrize(
    ("model", "problem"),
    [(Overwriting(), "can't be run for gradients: .*inplace operation"), (Detached(), "with gradients towards its input")],
)
def test_models_without_a_way_back_are_refused(model: nn.Module, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        images_at_once(model, torch.rand(2, 1, 4, 4), Engine())
