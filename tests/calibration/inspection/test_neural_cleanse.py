"""Neural Cleanse on digits: the backdoor's trigger is found, small, in its place, and it works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibration.inspection.anomaly import anomaly_indices
from calibration.inspection.neural_cleanse import Search, Triggers, blend, recover_triggers
from cli.demonstration.digits import ATTACK, Digits

TARGET = ATTACK.target_label


@pytest.fixture(scope="module")
def found(digits: Digits, backdoored: nn.Module) -> Triggers:
    return recover_triggers(backdoored, digits.clean.images(slice(None)), torch.arange(10), Search(steps=600), 0)


def test_the_target_needs_the_smallest_trigger(found: Triggers) -> None:
    assert int(found.sizes.argmin()) == TARGET
    assert float(anomaly_indices(found.sizes)[TARGET]) > 2.0


def test_what_is_found_works_on_other_images(found: Triggers, digits: Digits, backdoored: nn.Module) -> None:
    others = digits.test.images(torch.nonzero(digits.test.known_labels != TARGET).squeeze(1))
    with torch.inference_mode():
        answers = backdoored(found.put_on(TARGET, others)).argmax(dim=1)
    assert float((answers == TARGET).double().mean()) >= 0.95


def test_it_lies_where_the_true_trigger_is(found: Triggers, digits: Digits) -> None:
    clean = digits.test.images(slice(None))
    true = (ATTACK.trigger(clean) != clean).any(dim=0).any(dim=0)
    mask = found.masks[TARGET]
    assert float(mask[true].sum() / mask.sum()) >= 0.5 > float(true.double().mean())


def test_labels_do_not_disturb_each_other(digits: Digits, backdoored: nn.Module) -> None:
    images, search = digits.clean.images(slice(0, 200)), Search(steps=25, window=2)
    together = recover_triggers(backdoored, images, torch.arange(10), search, 0)
    alone = recover_triggers(backdoored, images, torch.tensor([TARGET]), search, 0)
    in_blocks = recover_triggers(backdoored, images, torch.arange(10), Search(steps=25, window=2, at_once=96), 0)
    for name in ("masks", "patterns", "success"):
        everything: Tensor = getattr(together, name)
        torch.testing.assert_close(getattr(alone, name)[0], everything[TARGET], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(getattr(in_blocks, name), everything, rtol=1e-3, atol=1e-3)


def test_labels_that_are_done_leave_the_batch(digits: Digits, backdoored: nn.Module) -> None:
    seen: list[int] = []

    def answers(images: Tensor) -> Tensor:
        seen.append(len(images))
        answered: Tensor = backdoored(images)
        return answered

    search = Search(steps=400, still=20)
    found = recover_triggers(answers, digits.clean.images(slice(None)), torch.arange(10), search, 0)
    assert sum(seen[1:]) == int(found.passes.sum())  # the first are the images as they are
    assert sum(seen[1:]) < 0.8 * 400 * 32 * 10
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert len(set(found.passes.tolist())) > 1


def test_memory_is_bounded(digits: Digits, backdoored: nn.Module) -> None:
    largest = 0

    def answers(images: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(images))
        answered: Tensor = backdoored(images)
        return answered

    recover_triggers(answers, digits.clean.images(slice(None)), torch.arange(10), Search(steps=2, at_once=100), 0)
    assert 64 <= largest <= 100


def test_a_label_that_no_trigger_reaches_is_told(digits: Digits) -> None:
    def never(images: Tensor) -> Tensor:
        return torch.stack([images.sum(dim=(1, 2, 3)) + 100.0, images.sum(dim=(1, 2, 3))], dim=1)

    found = recover_triggers(never, digits.clean.images(slice(0, 50)), torch.tensor([1]), Search(steps=30), 0)
    assert float(found.success[0]) == 0.0
    assert float(found.sizes[0]) == 64.0  # the whole image


def test_blend_by_hand() -> None:
    image, mask, pattern = torch.full((1, 2, 2), 0.2), torch.tensor([[0.0, 1.0], [0.5, 0.25]]), torch.ones(1, 2, 2)
    wanted = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    torch.testing.assert_close(blend(image, mask, pattern), wanted)
