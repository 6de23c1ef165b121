"""Strengthened triggers work on images that nobody saw, and lie where they lay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.inspection.strengthening import strengthen
from calibration.inspection.triggers import Triggers
from cli.demonstration.digits import ATTACK, Digits

TARGET = ATTACK.target_label


@pytest.fixture
def weak() -> Triggers:
    """The true trigger at 45% of its strength, for the target and for a label that it does nothing for."""
    mask, pattern = torch.zeros(8, 8), torch.zeros(1, 8, 8)
    blank = torch.zeros(1, 1, 8, 8)
    there = (ATTACK.trigger(blank) != blank)[0, 0]
    mask[there], pattern[:, there] = 0.45, 1.0
    return Triggers(
        torch.tensor([TARGET, TARGET]),
        torch.tensor([-1, 3]),
        mask.expand(2, 8, 8).clone(),
        pattern.expand(2, 1, 8, 8).clone(),
        torch.zeros(2),
        torch.tensor([5, 7]),
    )


def works(model: nn.Module, triggers: Triggers, digits: Digits) -> float:
    others = digits.test.images(torch.nonzero(digits.test.known_labels != TARGET).squeeze(1))
    with torch.inference_mode():
        return float((model(triggers.put_on(0, others)).argmax(dim=1) == TARGET).double().mean())


def test_a_weak_trigger_gets_strong_and_stays_in_place(digits: Digits, backdoored: nn.Module, weak: Triggers) -> None:
    assert works(backdoored, weak, digits) < 0.9
    strong = strengthen(backdoored, digits.clean.images(slice(None)), weak, 0, Engine())
    assert works(backdoored, strong, digits) >= 0.99
    there = weak.masks[0] > 0
    assert float(strong.masks[0][there].sum() / strong.masks[0].sum()) >= 0.7
    assert strong.success[0] > 0.98
    assert strong.labels.tolist() == [TARGET, TARGET]
    assert strong.passes.tolist() == [5 + 128 * 32, 7 + 128 * 32]


def test_a_pairs_trigger_is_of_its_source_alone(digits: Digits, backdoored: nn.Module, weak: Triggers) -> None:
    images, seen = digits.clean.images(slice(None)), list[Tensor]()
    with torch.inference_mode():
        threes = images[backdoored(images).argmax(dim=1) == 3]

    class Watched(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            if batch.requires_grad:
                seen.append(batch.detach())
            answers: Tensor = backdoored(batch)
            return answers

    pair = weak.select([1])
    pair.masks[:] = 0.0  # a search from nothing: what is shown is the images
    strengthen(Watched(), images, pair, 0, Engine())
    first = next(batch for batch in seen if len(batch) == 32)
    nearest = (first.unsqueeze(1) - threes.unsqueeze(0)).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert float(nearest.max()) < 0.01


def test_one_that_can_not_get_stronger_stays(digits: Digits, backdoored: nn.Module, weak: Triggers) -> None:
    images = digits.clean.images(slice(None))
    everything = torch.ones_like(weak.masks[:1])
    whole = Triggers(weak.labels[:1], weak.sources[:1], everything, weak.patterns[:1], torch.ones(1), weak.passes[:1])
    with torch.inference_mode():
        whole.patterns[:] = images[backdoored(images).argmax(dim=1) == TARGET][:1]
    assert torch.equal(strengthen(backdoored, images, whole, 0, Engine()).masks, everything)


def test_none_stay_none(digits: Digits, backdoored: nn.Module, weak: Triggers) -> None:
    assert len(strengthen(backdoored, digits.clean.images(slice(0, 10)), weak.select([]), 0, Engine())) == 0
