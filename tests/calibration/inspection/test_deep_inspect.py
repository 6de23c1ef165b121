"""DeepInspect on digits: without any of them, the backdoor's target is found, and in a clean twin nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.inspection import deep_inspect as deep_inspecting
from calibration.inspection.anomaly import deviation_factors
from calibration.inspection.deep_inspect import DeepInspected, DeepInspectSettings, TriggerGenerator, deep_inspect
from calibration.inspection.model_inversion import Inversion, invert, total_variation
from cli.demonstration.digits import ATTACK, Digits, digit_net
from guard.errors import CalibrationError, ModelError

TARGET = ATTACK.target_label
SHAPE = (1, 8, 8)
SETTINGS = DeepInspectSettings(steps=240, batch=6)
SHORT = DeepInspectSettings(inversion=Inversion(images=2, steps=3), steps=8, window=2, batch=2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def found(backdoored: nn.Module, engine: Engine) -> DeepInspected:
    return deep_inspect(backdoored, SHAPE, 10, SETTINGS, 0, engine)


@pytest.fixture(scope="module")
def clean_twin(digits: Digits) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    images, labels = digits.train.images(slice(None)), digits.train.known_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = digit_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(15):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


def test_the_target_is_the_only_outlier(found: DeepInspected) -> None:
    assert found.outliers == [TARGET]
    assert int(found.sizes.argmin()) == TARGET
    assert float(found.success[TARGET]) >= 0.85


def test_a_clean_twin_has_none(clean_twin: nn.Module, engine: Engine) -> None:
    twin = deep_inspect(clean_twin, SHAPE, 10, SETTINGS, 0, engine)
    assert twin.outliers == []
    assert float(twin.sizes.min() / twin.sizes.median()) > 0.5
    assert float(twin.success.min()) >= 0.75


def test_its_trigger_lies_where_the_true_one_is(found: DeepInspected, digits: Digits) -> None:
    clean = digits.test.images(slice(None))
    true = (ATTACK.trigger(clean) != clean).any(dim=0).any(dim=0)
    change = found.triggers[TARGET].abs().sum(dim=0)
    assert float(change[true].sum() / change.sum()) >= 0.5 > float(true.double().mean())
    torch.testing.assert_close(found.triggers.abs().sum(dim=(1, 2, 3)), found.sizes)


def test_success_is_what_put_on_reaches(found: DeepInspected, backdoored: nn.Module) -> None:
    with torch.no_grad():
        others = found.images.flatten(0, 1)
        others = others[backdoored(others).argmax(dim=1) != TARGET]
        got = backdoored(found.put_on(TARGET, others)).argmax(dim=1)
    assert float((got == TARGET).float().mean()) == pytest.approx(float(found.success[TARGET]), abs=0.1)


def test_recovered_images_have_their_labels_and_are_smooth(found: DeepInspected, backdoored: nn.Module) -> None:
    assert found.images.shape == (10, SETTINGS.inversion.images, *SHAPE)
    assert found.images.min() >= 0.0
    assert found.images.max() <= 1.0
    with torch.no_grad():
        answers = backdoored(found.images.flatten(0, 1)).argmax(dim=1)
    right = (answers == torch.arange(10).repeat_interleave(SETTINGS.inversion.images)).double().mean()
    assert float(right) == pytest.approx(found.agreement)
    assert found.agreement >= 0.9
    noise = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert float(total_variation(found.images.flatten(0, 1)).mean()) < 0.5 * float(total_variation(noise).mean())


def test_an_image_does_not_depend_on_those_beside_it(backdoored: nn.Module, engine: Engine) -> None:
    inversion = Inversion(images=3, steps=5)
    together = invert(backdoored, SHAPE, 10, inversion, 0, engine, 256)
    torch.testing.assert_close(invert(backdoored, SHAPE, 10, inversion, 0, engine, 7), together, rtol=1e-3, atol=1e-3)
    assert len({image.numpy().tobytes() for image in together.flatten(0, 1)}) == 30


def test_an_interrupted_inspection_goes_on(
    backdoored: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.inspection.deep_inspect._BETWEEN", 0.0)
    whole = deep_inspect(backdoored, SHAPE, 10, SHORT, 0, engine)
    seen: list[int] = []

    def interrupt(what: str, done: int, _: int) -> None:
        seen.append(done)
        if what == "looking for triggers" and done == 5:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "checkpoint", 1)
    with pytest.raises(KeyboardInterrupt):
        deep_inspect(backdoored, SHAPE, 10, SHORT, 0, engine, checkpoints, interrupt)
    steps: list[tuple[str, int]] = []
    resumed = deep_inspect(
        backdoored, SHAPE, 10, SHORT, 0, engine, checkpoints, lambda what, done, _: steps.append((what, done))
    )
    assert [done for what, done in steps if what == "looking for triggers"] == [5, 7, 10]
    for name in ("sizes", "success", "triggers", "images"):
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_neither_the_model_nor_the_global_generator_moves(backdoored: nn.Module, engine: Engine) -> None:
    before, weights = torch.get_rng_state(), [value.clone() for value in backdoored.parameters()]
    deep_inspect(backdoored, SHAPE, 10, SHORT, 0, engine)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(weights, backdoored.parameters(), strict=True))
    assert all(value.grad is None or not bool(value.grad.any()) for value in digit_net().parameters())


class Stubborn(nn.Module):
    """Answers 0 whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(1, 2, 3))
        return torch.stack([means + 100.0, means, means], dim=1)


class Silent(nn.Module):
    """Has no gradients."""

    def forward(self, images: Tensor) -> Tensor:
        return images.detach().mean(dim=(2, 3)).repeat(1, 3)


def test_what_can_not_be_inspected_is_refused(engine: Engine) -> None:
    with pytest.raises(CalibrationError, match="got label 0 for all 6 recovered images"):
        deep_inspect(Stubborn(), SHAPE, 3, SHORT, 0, engine)
    with pytest.raises(CalibrationError, match="at least two labels"):
        deep_inspect(Stubborn(), SHAPE, 1, SHORT, 0, engine)
    with pytest.raises(ModelError, match="without"):
        deep_inspect(Silent(), SHAPE, 3, SHORT, 0, engine)
    with pytest.raises(CalibrationError, match="at least 16 steps"):
        DeepInspectSettings(steps=3)


def test_the_generators_memory_is_bounded(backdoored: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = TriggerGenerator.forward

    def watched(generator: TriggerGenerator, noise: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(labels))
        return forward(generator, noise, labels)

    monkeypatch.setattr(TriggerGenerator, "forward", watched)
    whole = deep_inspect(backdoored, SHAPE, 10, SHORT, 0, engine)
    assert max(seen) == 20
    seen.clear()
    monkeypatch.setitem(deep_inspecting._GENERATED, "cpu", 5 * 4 * 10 * SHORT.width * 64)  # five triggers
    monkeypatch.setitem(deep_inspecting._GENERATED, "cuda", 5 * 4 * 10 * SHORT.width * 64)
    few = deep_inspect(backdoored, SHAPE, 10, SHORT, 0, engine)
    assert max(seen) <= 5
    assert float((few.triggers - whole.triggers).abs().mean()) < 1e-3  # bfloat16 rounds by the batch


def test_a_label_without_a_working_trigger_counts_as_the_whole_image(backdoored: nn.Module, engine: Engine) -> None:
    never = msgspec.structs.replace(SHORT, weight=1e6, steps=2)
    found = deep_inspect(backdoored, SHAPE, 10, never, 0, engine)
    assert found.sizes.tolist() == [64.0] * 10
    assert found.outliers == []


def test_several_that_hide_one_another_are_found_by_their_sizes() -> None:
    sizes = torch.tensor([10.0, 2.0, 9.5, 2.0, 11.0, 3.1, 12.0, 10.5, 10.0, 11.5])
    some = torch.zeros(10, 1, 1, 1)
    found = DeepInspected(sizes, torch.ones(10), some, some.unsqueeze(1), 1.0)
    assert float(found.factors.max()) < 2.0  # of the five small sizes three are an attacker's
    assert found.outliers == [1, 3]  # 3.1 of 10 is not under 0.3


def test_deviation_factors_by_hand() -> None:
    # median 10; below it 0 1 8 away, their median 1; above it 0 2 4, their median 2
    found = deviation_factors(torch.tensor([10.0, 9.0, 2.0, 12.0, 14.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 8.0, -1.0, -2.0], dtype=torch.float64) / 1.4826)
    assert deviation_factors(torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0])).tolist() == [0.0] * 5
    with pytest.raises(CalibrationError, match="expected at least 3 finite sizes"):
        deviation_factors(torch.ones(2))
