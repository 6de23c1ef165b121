"""Pruning by recovered triggers: the channels that they excite go, as many as it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from calibration.repair.cases import Parts, clean_parts
from calibration.repair.prunable import Prunable
from calibration.repair.pruning import Pruning, cheaper, fewest, repair_by_pruning
from cli.demonstration.digits import ATTACK, Digits
from guard.errors import RepairError
from guard.predictors.activations import Layer
from tests.calibration.repair.channels import (
    NORTH_WEST,
    SOUTH_EAST,
    Channels,
    accuracy,
    corner_triggers,
    digit_predictor,
    first,
    success,
    toy_parts,
    toy_predictor,
)
from tests.toy import toy_images, toy_trigger


@pytest.mark.parametrize(
    ("labels", "channels"),
    [((0,), (SOUTH_EAST,)), ((1,), (NORTH_WEST,)), ((1, 0), (NORTH_WEST, SOUTH_EAST)), ((0, 0), (SOUTH_EAST,))],
)
def test_only_the_triggers_own_channels_go(engine: Engine, labels: tuple[int, ...], channels: tuple[int, ...]) -> None:
    original = toy_predictor()
    copied = TrainableCopy.of(original)
    whole = Pruning(layer="last_convolution")
    pruned = repair_by_pruning(copied, original, toy_parts(original), corner_triggers(*labels), whole, engine)
    assert pruned.channels == channels
    assert pruned.total == 5
    assert pruned.accuracy_before == pruned.accuracy_after == 1.0
    assert pruned.success_before == (1.0,) * len(labels)
    assert pruned.success_after == (0.0,) * len(labels)


@pytest.mark.parametrize("layer", ["penultimate", "features"])
def test_neurons_are_pruned_one_by_one(engine: Engine, layer: Layer) -> None:
    original = toy_predictor()
    copied = TrainableCopy.of(original)
    pruned = repair_by_pruning(copied, original, toy_parts(original), corner_triggers(0), Pruning(layer=layer), engine)
    assert pruned.channels == (SOUTH_EAST * 4 + 3,)  # the channel in its corner
    assert pruned.total == 20
    images, labels = toy_images(40, seed=5)
    assert torch.equal(copied.predictor(toy_trigger(images)).argmax(dim=1), labels)


def test_a_trigger_from_some_labels_only_is_tried_on_these(engine: Engine) -> None:
    original = toy_predictor()
    trigger = corner_triggers(0)
    partial = Triggers(trigger.labels, torch.tensor([2]), trigger.masks, trigger.patterns, trigger.success, trigger.passes)
    parts = toy_parts(original)
    pruned = repair_by_pruning(TrainableCopy.of(original), original, parts, partial, Pruning(), engine)
    assert pruned.channels == (SOUTH_EAST * 4 + 3,)
    keep = parts.stopping.labels != 2
    stopping = parts.stopping
    without = type(stopping)(stopping.images[keep], stopping.labels[keep], stopping.answers[keep])
    with pytest.raises(RepairError, match="expected clean images of other labels"):
        repair_by_pruning(
            TrainableCopy.of(original), original, Parts(parts.tuning, without, parts.held_out), partial, Pruning(), engine
        )


@pytest.fixture(scope="module")
def digit_case(digits: Digits, backdoored: nn.Module, engine: Engine) -> tuple[Parts, Triggers]:
    """Of the backdoored digits, and the trigger that a search finds for their target."""
    original = digit_predictor(backdoored)
    parts, answers = clean_parts(digits.clean, original, 0), TrainableCopy.of(original).answers()
    goals = Goals.of(torch.tensor([ATTACK.target_label]))
    return parts, recover_triggers(answers, parts.tuning.images, goals, Search(steps=112).plain(), 0, engine)


@pytest.mark.parametrize("layer", ["last_convolution", "penultimate"])
def test_digits(
    digits: Digits, backdoored: nn.Module, digit_case: tuple[Parts, Triggers], engine: Engine, layer: Layer
) -> None:
    original, (parts, triggers) = digit_predictor(backdoored), digit_case
    before, copied = original.backend.fingerprint(), TrainableCopy.of(original)
    pruned = repair_by_pruning(copied, original, parts, triggers, Pruning(layer=layer), engine)
    assert pruned.success_before[0] >= 0.9
    assert pruned.success_after[0] <= 0.01
    assert 0 < len(pruned.channels) < pruned.total
    assert success(original, digits) == 1.0
    assert success(copied.predictor, digits) <= 0.2
    assert original.backend.fingerprint() == before

    prunable = Prunable(TrainableCopy.of(original), layer, parts.stopping.images, engine)
    prunable.silence(pruned.channels[:-1])  # one less is too few
    others = parts.stopping.labels != ATTACK.target_label
    answers = prunable.predictor(triggers.put_on(0, parts.stopping.images[others])).argmax(dim=1)
    assert float((answers == ATTACK.target_label).double().mean()) > 0.01


def test_neurons_one_by_one_cost_less_accuracy_than_channels(
    digits: Digits, backdoored: nn.Module, digit_case: tuple[Parts, Triggers], engine: Engine
) -> None:
    original, (parts, triggers) = digit_predictor(backdoored), digit_case
    cost = {}
    for layer in ("last_convolution", "features"):
        copied = TrainableCopy.of(original)
        pruned = repair_by_pruning(copied, original, parts, triggers, Pruning(layer=layer), engine)
        assert pruned.success_after[0] <= 0.01
        cost[layer] = accuracy(original, digits) - accuracy(copied.predictor, digits)
    assert success(copied.predictor, digits) <= 0.05
    assert cost["features"] <= 0.1 * cost["last_convolution"]


class Bypassed(nn.Module):
    """A trigger that the last convolution has no part in."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = Channels()
        with torch.no_grad():
            self.channels.convolution.weight[SOUTH_EAST] = 0.0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        fired = (images[:, 0, -2:, -2:].flatten(1).sum(dim=1) - 3.9).clamp_min(0.0)
        answers: Tensor = self.channels(images)
        return answers + 1000.0 * fired.unsqueeze(1) * torch.eye(4)[0]


def test_what_pruning_can_not_stop_is_told(engine: Engine) -> None:
    original = toy_predictor(Bypassed())
    with pytest.raises(RepairError, match=r"to label 0.* works on 100% of the images with all 20 neurons"):
        repair_by_pruning(TrainableCopy.of(original), original, toy_parts(original), corner_triggers(0), Pruning(), engine)


def test_nothing_to_prune_by_is_told(engine: Engine) -> None:
    original = toy_predictor()
    parts = toy_parts(original)
    with pytest.raises(RepairError, match="expected a recovered trigger"):
        repair_by_pruning(TrainableCopy.of(original), original, parts, corner_triggers(0).select([]), Pruning(), engine)
    with pytest.raises(RepairError, match="expected a limit of 0 or more"):
        Pruning(limit=1.0)
    with pytest.raises(RepairError, match="expected a budget of 0 to 100 points"):
        Pruning(budget=-1.0)


def test_silenced_channels_are_heard_again(engine: Engine) -> None:
    original = toy_predictor()
    images = first(toy_parts(original).tuning, 8).images
    prunable = Prunable(TrainableCopy.of(original), "last_convolution", images, engine)
    prunable.silence([0, 1])
    assert not torch.equal(prunable.predictor(images), original(images))
    prunable.silence([])
    assert torch.equal(prunable.predictor(images), original(images))


@pytest.mark.parametrize("total", [1, 5, 32, 100, 515])
def test_the_fewest_are_found_without_asking_for_each(total: int) -> None:
    for wanted in {0, 1, total // 2, total - 1, total}:
        asked: list[int] = []

        def enough(count: int, wanted: int = wanted, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= wanted

        assert fewest(total, enough) == wanted
        assert len(asked) <= 45
    assert fewest(total, lambda _: False) is None


def test_the_last_of_a_trigger_is_not_stopped_at_any_price() -> None:
    shares = {96: 0.04, 128: 0.012, 160: 0.011, 192: 0.014}

    def works(count: int) -> float:
        return shares.get(count, 0.5 if count < 96 else 0.02)

    assert cheaper(1024, works, lambda count: count <= 512, 0.05) == 160  # the least of what is left
    assert cheaper(1024, works, lambda count: count <= 130, 0.05) == 128
    assert cheaper(1024, works, lambda count: count <= 130, 0.01) == 1024  # nothing that stops it is affordable
    assert cheaper(1, works, lambda _: True, 0.05) == 1
