"""Neural Cleanse on digits: the backdoor's trigger is found, small, in its place, and it works."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.inspection import block, neural_cleanse, passes
from calibration.inspection.anomaly import anomaly_indices
from calibration.inspection.block import _start
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.passes import images_at_once
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers, blend
from cli.demonstration.digits import ATTACK, Digits
from guard.errors import CalibrationError, ModelError

TARGET = ATTACK.target_label


class Watched(nn.Module):
    """A model that remembers how many images it was shown at a time while gradients were wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            self.seen.append(len(images))
        answers: Tensor = self.model(images)
        return answers


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def found(digits: Digits, backdoored: nn.Module, engine: Engine) -> Triggers:
    search = Search(steps=400, draws=1)
    return recover_triggers(backdoored, digits.clean.images(slice(None)), Goals.all_labels(10), search, 0, engine)


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
    assert float(mask[true].sum() / mask.sum()) >= 0.4 > 2.0 * float(true.double().mean())


def test_labels_do_not_disturb_each_other(
    digits: Digits, backdoored: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, search = digits.clean.images(slice(0, 200)), Search(steps=24, window=2).plain()
    together = recover_triggers(backdoored, images, Goals.all_labels(10), search, 0, engine)
    alone = recover_triggers(backdoored, images, Goals.of(torch.tensor([TARGET])), search, 0, engine)
    monkeypatch.setitem(passes._AT_ONCE, "cpu", 24)  # not even one label's images fit
    monkeypatch.setattr(neural_cleanse, "_PER_LABEL", 1)  # several blocks
    in_blocks = recover_triggers(backdoored, images, Goals.all_labels(10), search, 0, engine)
    for name in ("masks", "patterns"):
        everything: Tensor = getattr(together, name)
        assert float((getattr(alone, name)[0] - everything[TARGET]).abs().max()) < 0.1  # bfloat16 rounds by the batch
        assert float((getattr(in_blocks, name) - everything).abs().mean()) < 0.02


def test_labels_leave_the_batch(digits: Digits, backdoored: nn.Module, engine: Engine) -> None:
    watched = Watched(backdoored)
    images, search = digits.clean.images(slice(None)), Search(steps=480, first=96, draws=0)
    found = recover_triggers(watched, images, Goals.all_labels(10), search, 0, engine)
    assert sum(watched.seen[4:]) == int(found.passes.sum())  # the first four see what gradients an image needs
    smallest = set(found.sizes.argsort()[:3].tolist())
    assert {row for row, passes in enumerate(found.passes.tolist()) if passes > 96 * 16} == smallest
    plain = recover_triggers(watched, images, Goals.all_labels(10), Search(steps=48, first=16, still=16).plain(), 0, engine)
    assert set(plain.passes.tolist()) == {48 * 32}


def test_the_smallest_are_searched_again_from_other_draws(digits: Digits, backdoored: nn.Module, engine: Engine) -> None:
    watched, labels = Watched(backdoored), Goals.all_labels(10)
    images, search = digits.clean.images(slice(0, 400)), Search(steps=128, first=64, still=128, draws=0)
    once = recover_triggers(backdoored, images, labels, search, 0, engine)
    again = msgspec.structs.replace(search, again=4, draws=2, early=64)
    found = recover_triggers(watched, images, labels, again, 0, engine)
    assert sum(watched.seen[4:]) == int(found.passes.sum())
    smallest = set(once.sizes.argsort()[:4].tolist())
    assert {row for row in range(10) if found.passes[row] > once.passes[row]} == smallest
    assert (found.passes - once.passes).max() == (64 + 128) * 16  # one of the draws leaves early
    assert bool((found.sizes <= once.sizes).all())
    changed = {row for row in range(10) if not torch.equal(found.masks[row], once.masks[row])}
    assert changed == {row for row in range(10) if found.sizes[row] < once.sizes[row]}
    assert 1 <= len(changed) <= 4
    largest = int(once.sizes.argmax())
    doubtful = recover_triggers(backdoored, images, labels, again, 0, engine, doubtful=[largest])
    assert doubtful.passes[largest] > once.passes[largest]
    assert doubtful.sizes[largest] <= once.sizes[largest]


def test_draws_of_the_same_label_begin_elsewhere() -> None:
    shape = torch.Size((1, 4, 4))
    starts = [_start(shape, 1.0, 0, 3, -1, draw)[0] for draw in range(3)] + [_start(shape, 1.0, 1, 3, -1)[0]]
    assert len({tuple(mask.flatten().tolist()) for mask in starts}) == 4


def test_memory_is_bounded(digits: Digits, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def net(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * channels, 10))

    images, wide = digits.clean.images(slice(0, 64)), net(64)
    monkeypatch.setitem(passes._ACTIVATIONS, "cpu", 1 << 19)
    few = images_at_once(wide, images, engine)
    assert 16 <= few <= 64  # 64 channels of 64 pixels are 8 or 16 KiB
    assert images_at_once(net(128), images, engine) == pytest.approx(few / 2, abs=1.0)
    watched = Watched(wide)
    recover_triggers(watched, images, Goals.all_labels(10), Search(steps=16), 0, engine)
    assert max(watched.seen) <= max(few, 32)


@pytest.mark.parametrize(
    ("step", "left"), [pytest.param("looking for triggers", 0.8, marks=pytest.mark.slow), ("looking again", 0.4)]
)
def test_an_interrupted_search_comes_to_the_same(
    digits: Digits,
    backdoored: nn.Module,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    left: float,
) -> None:
    images = digits.clean.images(slice(0, 300))
    search = Search(steps=80, first=32, early=16, draws=2)
    monkeypatch.setattr(block, "_BETWEEN", 0.0)
    monkeypatch.setattr(block, "_WORTH", 0.0)
    whole = recover_triggers(backdoored, images, Goals.all_labels(10), search, 0, engine)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == step and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_triggers(
            backdoored, images, Goals.all_labels(10), search, 0, engine, Checkpoints(tmp_path / "c", 1), progress=interrupt
        )
    watched = Watched(backdoored)
    resumed = recover_triggers(watched, images, Goals.all_labels(10), search, 0, engine, Checkpoints(tmp_path / "c", 1))
    assert sum(watched.seen) < left * int(whole.passes.sum())
    for name in Triggers.__dataclass_fields__:
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name))


def test_pairs_use_the_images_of_their_source_alone(digits: Digits, engine: Engine) -> None:
    pairs = Goals.pairs(3)
    assert list(zip(pairs.labels.tolist(), pairs.sources.tolist(), strict=True)) == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)
    ]  # fmt: skip

    class ByBrightness(nn.Module):
        """Label 0, 1 or 2 for dark, grey and bright images; a corner pixel makes grey ones 0."""

        def forward(self, images: Tensor) -> Tensor:
            level = images[:, 0, 2:, 2:].mean(dim=(1, 2)) * 10.0
            grey = 8.0 - 8.0 * (level - 5.0).abs()
            logits = torch.stack([5.0 - 4.0 * level + 0.0, grey, 4.0 * level - 35.0], dim=1)
            corner = nn.functional.one_hot(torch.tensor(0), 3) * (images[:, 0, 0, 0] * 40.0).unsqueeze(1)
            return logits + corner * ((level - 5.0).abs() < 2.0).float().unsqueeze(1)

    levels = torch.tensor([0.05, 0.5, 0.95]).repeat_interleave(20)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    images[:, 0, 0, 0] = 0.0
    found = recover_triggers(ByBrightness(), images, pairs, Search(steps=320, draws=0), 0, engine)
    sizes = dict(zip(zip(pairs.labels.tolist(), pairs.sources.tolist(), strict=True), found.sizes.tolist(), strict=True))
    assert sizes[0, 1] < 2.0 < sizes[0, 2]


def test_without_an_image_to_send_the_label_is_named(digits: Digits, engine: Engine) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full((len(images),), 1), 3).float() + 0.0 * images.mean(dim=(1, 2, 3)).unsqueeze(
                1
            )

    with pytest.raises(CalibrationError, match="another label than 1, got none"):
        recover_triggers(Constant(), digits.clean.images(slice(0, 9)), Goals.all_labels(3), Search(), 0, engine)


def test_a_model_without_gradients_is_refused(digits: Digits, engine: Engine) -> None:
    class Rounded(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.detach().flatten(1)

    with pytest.raises(ModelError, match="gradients towards its input"):
        recover_triggers(Rounded(), digits.clean.images(slice(0, 9)), Goals.all_labels(3), Search(), 0, engine)


def test_a_label_that_no_trigger_reaches_is_told(digits: Digits, engine: Engine) -> None:
    class Never(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            total = images.sum(dim=(1, 2, 3))
            return torch.stack([total + 100.0, total], dim=1)

    found = recover_triggers(
        Never(), digits.clean.images(slice(0, 50)), Goals.of(torch.tensor([1])), Search(steps=32), 0, engine
    )
    assert float(found.success[0]) == 0.0
    assert float(found.sizes[0]) == 64.0  # the whole image


def test_blend_by_hand() -> None:
    image, mask, pattern = torch.full((1, 2, 2), 0.2), torch.tensor([[0.0, 1.0], [0.5, 0.25]]), torch.ones(1, 2, 2)
    wanted = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    torch.testing.assert_close(blend(image, mask, pattern), wanted)


def test_any_seed_that_the_command_takes_will_do() -> None:
    mask, _ = _start(torch.Size((1, 4, 4)), 1.0, 2**31 - 1, 42, 41)
    assert bool(mask.isfinite().all())
