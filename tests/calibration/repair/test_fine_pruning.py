"""Fine-pruning: what lies dormant is silenced and stays so, and no more accuracy is spent than allowed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import clean_parts
from calibration.repair.fine_pruning import FinePruning, repair_by_fine_pruning
from calibration.repair.plain_fine_tuning import OURS, FineTuning
from calibration.repair.prunable import Prunable, accuracy_of
from cli.demonstration.digits import Digits
from guard.errors import ModelError, RepairError
from guard.predictors.activations import activations
from tests.calibration.repair.channels import (
    DEAD,
    FAINT,
    NORTH_WEST,
    SOUTH_EAST,
    accuracy,
    digit_predictor,
    success,
    toy_parts,
    toy_predictor,
)
from tests.toy import toy_images, toy_trigger

QUICK = FineTuning(tuning=msgspec.structs.replace(OURS, epochs=8))
BRIEF = FinePruning(fine_tuning=FineTuning(tuning=msgspec.structs.replace(OURS, epochs=2)))


def test_dormant_channels_go_first_and_useful_ones_stay(engine: Engine) -> None:
    original = toy_predictor()
    copied = TrainableCopy.of(original)
    pruned = repair_by_fine_pruning(copied, original, toy_parts(original), BRIEF, engine, 0)
    assert pruned.channels == (DEAD, SOUTH_EAST, NORTH_WEST, FAINT)
    assert pruned.total == 5
    assert pruned.accuracy_before == pruned.accuracy_after == 1.0
    images, labels = toy_images(40, seed=5)
    assert bool((original(toy_trigger(images)).argmax(dim=1) == 0).all())
    assert torch.equal(copied.predictor(toy_trigger(images)).argmax(dim=1), labels)


def test_pruned_channels_stay_silent_and_the_trigger_goes(digits: Digits, backdoored: nn.Module, engine: Engine) -> None:
    original = digit_predictor(backdoored)
    parts = clean_parts(digits.clean, original, 0)
    copied, pruned_only = TrainableCopy.of(original), TrainableCopy.of(original)
    settings = FinePruning(fine_tuning=QUICK)
    pruned = repair_by_fine_pruning(copied, original, parts, settings, engine, 0)
    assert 0 < len(pruned.channels) < pruned.total == 32
    shown = activations(copied.predictor, digits.triggered.images(slice(None)), "last_convolution")
    assert not bool(shown[:, list(pruned.channels)].any())
    others = [channel for channel in range(32) if channel not in pruned.channels]
    assert bool(shown[:, others].any())
    assert success(copied.predictor, digits) <= 0.2
    assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.08

    prunable = Prunable(pruned_only, "last_convolution", parts.stopping.images, engine)
    prunable.silence(pruned.channels)
    assert accuracy_of(prunable.predictor, parts.stopping) == pruned.accuracy_after >= pruned.accuracy_before - 0.04
    order = prunable.mean_activations(parts.tuning.images)[others]  # of what is left, after pruning
    prunable.silence([*pruned.channels, others[int(order.argmin())]])
    assert accuracy_of(prunable.predictor, parts.stopping) < pruned.accuracy_before - 0.04


def test_an_interrupted_one_goes_on_with_what_it_pruned(engine: Engine, tmp_path: Path) -> None:
    original = toy_predictor()
    parts, whole, halved = toy_parts(original), TrainableCopy.of(original), TrainableCopy.of(original)
    pruned = repair_by_fine_pruning(whole, original, parts, BRIEF, engine, 0)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "fine-tuning" and done == 1:
            raise KeyboardInterrupt

    checkpoints, seen = Checkpoints(tmp_path / "checkpoint", 1), []
    with pytest.raises(KeyboardInterrupt):
        repair_by_fine_pruning(halved, original, parts, BRIEF, engine, 0, checkpoints, interrupt)
    resumed = TrainableCopy.of(original)
    told = repair_by_fine_pruning(resumed, original, parts, BRIEF, engine, 0, checkpoints, lambda *now: seen.append(now))
    assert seen == [("fine-tuning", 2, 2)]  # nothing is pruned again
    assert told == pruned
    torch.testing.assert_close(resumed.parameters[0], whole.parameters[0])


class Dense(nn.Module):
    """Without convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(images.flatten(1))
        return out


def test_what_can_not_be_pruned_is_refused(engine: Engine) -> None:
    original = toy_predictor(Dense())
    with pytest.raises(ModelError, match="expected a model with a 2-D convolution"):
        repair_by_fine_pruning(TrainableCopy.of(original), original, toy_parts(original), BRIEF, engine, 0)
    with pytest.raises(RepairError, match="expected a budget of 0 to 100 points"):
        FinePruning(budget=-1.0)
