"""How many threads a command takes does not decide whether it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cli.threads import settle_threads
from guard import Predictor
from guard.predictors import wrap
from tests.toy import SPEC, ToyNet


class Particular(nn.Module):
    """Answers few kinds of images."""

    def __init__(self, flat: bool, noise: bool) -> None:
        super().__init__()
        self.flat, self.noise, self.net = flat, noise, ToyNet()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        flat = bool((images.flatten(1).std(dim=1) == 0.0).any())
        if (flat and not self.flat) or (not flat and not self.noise):
            raise RuntimeError("no such images")
        answers: Tensor = self.net(images)
        return answers


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """As many as before, afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(("flat", "noise"), [(False, True), (True, False), (False, False)])
def test_a_model_that_is_particular_stops_no_command(threads: int, flat: bool, noise: bool) -> None:
    settle_threads(Predictor(wrap(Particular(flat, noise)), SPEC, 4, "logits"))
    assert torch.get_num_threads() in ((threads, 1) if noise else (threads,))
