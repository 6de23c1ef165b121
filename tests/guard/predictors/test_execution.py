"""How PyTorch runs a model: the same answers, in another order of axes, or nearly the same in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guard import InputSpec, Predictor
from guard.predictors import Execution, wrap

SPEC = InputSpec(channels=3, height=8, width=8)
LAST = Execution(memory_format="channels-last")
REDUCED = Execution(precision="bfloat16")


class Seeing(nn.Module):
    """Remembers what it was given and computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.last: bool | None = None
        self.computed: torch.dtype | None = None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.last = images.is_contiguous(memory_format=torch.channels_last)
        found = self.convolution(images)
        self.computed = found.dtype
        logits: Tensor = 3.0 * found.mean(dim=(2, 3))
        return logits


@pytest.fixture
def model() -> Seeing:
    with torch.random.fork_rng():
        return Seeing()


def noise(count: int) -> Tensor:
    return torch.rand(count, *SPEC.shape, generator=torch.Generator().manual_seed(0))


def predictor(model: nn.Module, execution: Execution) -> Predictor:
    return Predictor(wrap(model), SPEC, 4, "logits", execution=execution)


@pytest.mark.parametrize(("execution", "last", "computed"), [(LAST, True, torch.float32), (REDUCED, False, torch.bfloat16)])
def test_the_model_is_run_as_told_and_answers_the_same(
    model: Seeing, execution: Execution, last: bool, computed: torch.dtype
) -> None:
    images = noise(5)
    expected = predictor(model, Execution())(images)
    assert (model.last, model.computed) == (False, torch.float32)
    answers = predictor(model, execution)(images)
    assert (model.last, model.computed) == (last, computed)
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers, expected, atol=1e-6 if execution is LAST else 1e-2, rtol=0.0)


def test_one_channel_is_last_too() -> None:
    """Both orders are one, and a convolution goes by the strides."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    results: list[Tensor] = []

    def run(images: object) -> Tensor:
        assert isinstance(images, Tensor)
        results.append(net(images))
        return results[-1]

    batch = noise(15)[..., :6].reshape(45, 1, 8, 6)
    strewn = batch.transpose(2, 3).contiguous().transpose(2, 3)
    for execution, images in ((Execution(), batch), (LAST, batch), (LAST, strewn)):
        execution.run(run, images)
    assert [found.is_contiguous(memory_format=torch.channels_last) for found in results] == [False, True, True]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_answers_that_go_out_are_in_full_precision(model: Seeing) -> None:
    fast = predictor(model, Execution(memory_format="channels-last", precision="bfloat16"))
    fast.in_full_precision()(noise(2))
    assert (model.last, model.computed) == (True, torch.float32)
    ordinary = replace(fast, execution=LAST)
    assert ordinary.in_full_precision() is ordinary


def test_other_arrays_are_left_alone() -> None:
    batch = np.zeros((2, 3, 8, 8), dtype=np.float32)
    assert LAST.run(lambda given: given, batch) is batch
    rows = torch.zeros(2, 64)
    assert LAST.run(lambda given: given, rows) is rows
