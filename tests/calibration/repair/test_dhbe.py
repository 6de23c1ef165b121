"""DHBE: losses and generators by hand, what reaches the model, and a trigger that loses its hold without any data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.dhbe import repair_by_dhbe
from calibration.repair.dhbe_game import apart, student_loss
from calibration.repair.dhbe_generators import DoublingConv2d, SampleGenerator, TriggerGenerator, paste, total_variation
from calibration.repair.dhbe_settings import Dhbe
from cli.demonstration.digits import ATTACK, Digits
from guard import InputSpec, Predictor
from guard.errors import ModelError, RepairError
from guard.predictors import Backend, load_backend, wrap
from tests.guard.models import save_exported, save_torchscript
from tests.toy import SPEC, LearningToy

TINY = Dhbe(epochs=1, iterations=1, student_steps=1, batch=8, rate=1e-3, patch=3, latent=8, width=4)


def noise(count: int, latent: int = 16) -> Tensor:
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """A convolution, batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 4)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.last(self.norm(self.first(images)).relu().flatten(1))
        return answers


class Recorder(Normed):
    """Remembers what it was shown; looks at values, so that it is not traced, and goes on remembering."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        if bool(images.isfinite().all()):
            Recorder.seen.append(images.detach().clone())
        return super().forward(images)


def predictor(module: nn.Module, spec: InputSpec = SPEC) -> Predictor:
    return Predictor(wrap(module), spec, 4, "logits")


def weights(copied: TrainableCopy) -> list[Tensor]:
    return [value.detach().clone() for value in copied.answers().state_dict().values()]


def test_losses_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.5], [1.0, -1.0]])
    patched = torch.tensor([[0.0, 0.0], [1.0, 3.0]], requires_grad=True)
    assert float(apart(student, teacher).detach()) == pytest.approx((1.0 + 0.5 + 0.0 + 2.0) / 4.0)
    loss = student_loss(student, teacher, patched, 0.1)
    assert float(loss.detach()) == pytest.approx(0.875 + 0.1 * (2.0 + 2.0) / 4.0)
    loss.backward()
    assert student.grad is not None
    assert patched.grad is not None
    assert student.grad.tolist() == [[0.25, -0.25], [0.0, 0.25]]  # nothing of the second term
    torch.testing.assert_close(patched.grad, torch.tensor([[-0.025, 0.0], [0.0, 0.025]]))


def test_total_variation_by_hand() -> None:
    sample = torch.tensor([[0.0, 1.0], [3.0, 2.0]]).view(1, 1, 2, 2)
    across, down, one, other = math.hypot(1, -1), math.hypot(3, 1), 2.0, 2.0
    assert float(total_variation(sample)) == pytest.approx(across + down + one + other)
    assert float(total_variation(sample.expand(4, 3, 2, 2))) == pytest.approx(math.sqrt(12.0) * (across + down + one + other))


@pytest.mark.parametrize(
    ("shape", "start"),
    [
        ((1, 8, 8), (2, 2)),
        ((1, 28, 28), (7, 7)),
        ((3, 32, 32), (8, 8)),
        ((3, 48, 48), (12, 12)),
        ((3, 64, 64), (16, 16)),
        ((3, 33, 47), (9, 12)),
    ],
)
def test_samples_have_the_images_size_zero_mean_and_unit_variance(shape: tuple[int, int, int], start: tuple[int, int]) -> None:
    generator = SampleGenerator(shape, latent=16, width=4)
    assert generator.body[0].out_features == 8 * start[0] * start[1]
    samples = generator(noise(16))
    assert samples.shape == (16, *shape)
    torch.testing.assert_close(samples.mean(dim=(0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(samples.var(dim=(0, 2, 3)), torch.ones(shape[0]), atol=1e-2, rtol=0)
    assert SampleGenerator(shape, latent=16, width=4, doublings=3)(noise(2)).shape == (2, *shape)


def test_generators_are_the_authors() -> None:
    samples, triggers = SampleGenerator((3, 32, 32)), TriggerGenerator(3)
    linear = 257 * 128 * 64, 257 * 64 * 25
    convolutions = (128 * 9 + 1) * 128 + (128 * 9 + 1) * 64 + (64 * 9 + 1) * 3, (64 * 9 + 1) * 3
    norms = 2 * (128 + 128 + 64), 2 * 64
    for generator, *parts in zip((samples, triggers), linear, convolutions, norms, strict=True):
        assert sum(value.numel() for value in generator.parameters()) == sum(parts)
    assert len(list(samples.buffers())) == 0  # no statistics but the batch's


def test_a_doubling_convolution_is_a_convolution_of_the_doubled_image() -> None:
    layer, images = DoublingConv2d(3, 5), torch.rand(2, 3, 6, 4)
    doubled = nn.functional.interpolate(images, scale_factor=2.0)
    torch.testing.assert_close(layer(images), nn.functional.conv2d(doubled, layer.weight, layer.bias, padding=1))


def test_patches_lie_around_zero() -> None:
    patches = TriggerGenerator(3, 5, latent=16, width=8)(noise(64)).detach()
    assert patches.shape == (64, 3, 5, 5)
    assert float(patches.abs().max()) <= 1.0
    assert float(patches.abs().mean()) > 0.4
    assert float(patches.mean().abs()) < 0.05


def test_a_patch_is_added_and_nothing_is_clipped() -> None:
    images = torch.full((2, 1, 4, 6), 0.75)
    patches = torch.tensor([[1.0, -1.0], [0.5, 0.0]]).expand(2, 1, 2, 2)
    pasted = paste(images, patches, top=1, left=3)
    assert pasted[1, 0].tolist() == [
        [0.75] * 6,
        [0.75, 0.75, 0.75, 1.75, -0.25, 0.75],
        [0.75, 0.75, 0.75, 1.25, 0.75, 0.75],
        [0.75] * 6,
    ]
    assert torch.equal(pasted[0], pasted[1])


def test_what_reaches_the_model(engine: Engine) -> None:
    """In a student's step: teacher and student see the samples, then the student the patched ones."""
    original = predictor(Recorder(), InputSpec(channels=1, height=8, width=8, mean=(0.2,), std=(0.3,)))
    copied, places = TrainableCopy.of(original), set()
    Recorder.seen.clear()
    repair_by_dhbe(copied, original, msgspec.structs.replace(TINY, iterations=12, batch=16), engine, seed=0)
    shown = [images.float() for images in Recorder.seen if len(images) == 16]  # not the two that try a memory order
    for step in range(12):
        of_teacher, of_student, patched = shown[7 * step : 7 * step + 3]
        assert torch.equal(of_teacher, of_student)
        assert abs(float(of_student.mean())) < 0.01  # normalised by the model's own mean and std
        assert float(of_student.std()) == pytest.approx(1.0, abs=0.05)
        rows, columns = ((patched - of_student).abs().amax(dim=side) > 1e-4 for side in ((0, 1, 3), (0, 1, 2)))
        assert int(rows.sum()) == int(columns.sum()) == 3
        assert float((patched - of_student).abs().max()) > 0.5 / 0.3
        assert float((patched * 0.3 + 0.2).max()) > 1.0  # in pixels: not clipped
        places.add((int(rows.int().argmax()), int(columns.int().argmax())))
    assert len(places) > 6


def test_pixels_are_the_settings_then_the_models_then_the_usual() -> None:
    def found(settings: Dhbe, **options: tuple[float, ...]) -> list[list[float]]:
        spec = InputSpec(channels=3, height=8, width=8, **options)  # type: ignore[arg-type]
        return [values.flatten().tolist() for values in settings.pixels(spec)]

    assert found(Dhbe()) == [[0.5] * 3, [0.25] * 3]
    own = {"mean": (0.5, 0.25, 0.125), "std": (0.5, 0.25, 0.125)}
    assert found(Dhbe(), **own) == [[0.5, 0.25, 0.125]] * 2
    assert found(Dhbe(mean=(0.75,), std=(0.5,)), **own) == [[0.75] * 3, [0.5] * 3]
    with pytest.raises(RepairError, match="expected 1 or 3 values of mean, one per channel, got 2"):
        found(Dhbe(mean=(0.1, 0.2)))


def test_rates_fall_twice_at_the_same_shares_of_any_training() -> None:
    settings = Dhbe()
    assert [settings.share_of_rates(epoch / 300) for epoch in (0, 179, 180, 239, 240, 299)] == pytest.approx(
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )
    assert [settings.share_of_rates(iteration / 10) for iteration in (0, 5, 6, 8)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    ("height", "width", "batch_norm", "expected"),
    [
        (28, 28, True, (0.1, 2)),
        (32, 32, False, (0.01, 2)),
        (47, 32, True, (0.1, 2)),
        (48, 48, False, (0.01, 3)),
        (64, 64, True, (0.1, 3)),
        (32, 64, True, (0.1, 3)),
    ],
)
def test_a_model_gets_the_rate_and_the_generator_that_it_needs(
    height: int, width: int, batch_norm: bool, expected: tuple[float, int]
) -> None:
    settings = Dhbe.suited(InputSpec(channels=3, height=height, width=width), batch_norm)
    assert (settings.rate, settings.doublings) == expected
    assert settings == msgspec.structs.replace(Dhbe(), rate=settings.rate, doublings=settings.doublings)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (27, 32), (32, 65), (224, 224)])
def test_images_that_it_was_not_made_for_are_refused(height: int, width: int) -> None:
    with pytest.raises(RepairError, match=rf"images of 28 to 64 pixels a side for dhbe, got {height}x{width}: use another"):
        Dhbe.suited(InputSpec(channels=3, height=height, width=width), True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"epochs": 0}, "epochs"), ({"batch": 1}, "batch"), ({"doublings": -1}, "doublings"), ({"std": (0.0,)}, "std")],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RepairError, match=said):
        msgspec.structs.replace(Dhbe(), **changes)


class Rounding(Normed):
    """Its input gets no gradients."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul(255.0).round().div(255.0))


def test_models_and_settings_that_do_not_fit_are_refused(engine: Engine) -> None:
    def attempt(settings: Dhbe, module: nn.Module, spec: InputSpec = SPEC) -> None:
        original = predictor(module, spec)
        repair_by_dhbe(TrainableCopy.of(original), original, settings, engine, seed=0)

    with pytest.raises(RepairError, match="expected a patch of at most 8 pixels, got 9"):
        attempt(Dhbe(patch=9), Normed())
    with pytest.raises(ModelError, match="got one that takes uint8"):
        attempt(TINY, Normed(), msgspec.structs.replace(SPEC, dtype="uint8"))
    with pytest.raises(ModelError, match="expected a model whose input gets gradients"):
        attempt(TINY, Rounding())
    with pytest.raises(RepairError, match="ceased to be numbers in epoch 1: lower the rate 1e"):
        attempt(msgspec.structs.replace(TINY, rate=1e30, iterations=9), Normed())


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(engine: Engine, tmp_path: Path) -> None:
    original = predictor(Normed())
    settings = msgspec.structs.replace(TINY, epochs=5, iterations=2, student_steps=2, rate=1e-2)
    whole, halved, resumed = (TrainableCopy.of(original) for _ in range(3))
    state, before = torch.get_rng_state(), original.backend.fingerprint()
    expected = repair_by_dhbe(whole, original, settings, engine, seed=3)

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    checkpoints, watched = Checkpoints(tmp_path / "checkpoint", "work"), list[int]()
    with pytest.raises(KeyboardInterrupt):
        repair_by_dhbe(halved, original, settings, engine, 3, checkpoints, interrupt, watched.append)
    found = repair_by_dhbe(resumed, original, settings, engine, 3, checkpoints, watch=watched.append)
    assert watched == [1, 2, 3, 4, 5]
    for value, wanted in zip(weights(resumed), weights(whole), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.samples, expected.samples, atol=1e-4, rtol=1e-3)
    assert found.agreement == pytest.approx(expected.agreement, abs=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert original.backend.fingerprint() == before


def test_a_student_that_has_collapsed_gives_one_label(engine: Engine) -> None:
    original = predictor(Normed())
    assert repair_by_dhbe(TrainableCopy.of(original), original, TINY, engine, 0).labels == 4
    shrinking = msgspec.structs.replace(TINY, iterations=9, rate=0.01, momentum=0.0, decay=99.0)  # no weight is left
    assert repair_by_dhbe(TrainableCopy.of(original), original, shrinking, engine, 0).labels == 1


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norm_takes_its_statistics_from_the_samples_where_that_is_asked_for(engine: Engine, wanted: bool) -> None:
    net = Normed()
    original, modes = predictor(net), list[bool]()
    copied = TrainableCopy.of(original)
    norm = copied.answers().module.norm
    assert isinstance(norm, nn.BatchNorm2d)
    settings = msgspec.structs.replace(TINY, batch_statistics=wanted)
    repair_by_dhbe(copied, original, settings, engine, 0, watch=lambda _: modes.append(norm.training))
    assert modes == [False]
    assert norm.running_var is not None
    assert (float((norm.running_var - 1.0).abs().max()) > 0.01) == wanted
    assert net.norm.running_var is not None
    assert net.norm.running_var.tolist() == [1.0] * 4  # the original's


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: load_backend(str(save_torchscript(LearningToy(), folder / "toy.pt"))),
        lambda folder: load_backend(str(save_exported(LearningToy(), folder / "toy.pt2", batch=5))),
    ],
    ids=["torchscript", "exported for batches of five"],
)
def test_model_files_can_be_repaired(save: Callable[[Path], Backend], tmp_path: Path, engine: Engine) -> None:
    original = Predictor(save(tmp_path), SPEC, 4, "logits")
    copied = TrainableCopy.of(original)
    before = weights(copied)
    outcome = repair_by_dhbe(copied, original, TINY, engine, 0)
    assert outcome.samples.shape == (16, 1, 8, 8)
    assert outcome.triggers.shape == (16, 1, 3, 3)
    assert outcome.compared == 1024
    assert any(not torch.equal(*pair) for pair in zip(weights(copied), before, strict=True))


@pytest.mark.slow
def test_the_trigger_loses_most_of_its_hold_without_any_data(engine: Engine, digits: Digits, backdoored: nn.Sequential) -> None:
    """In 160 turns the target's lead falls to a quarter, and it no longer leads for some of the images.

    So short a game costs some agreement, too: patches of 5x5 pixels are much of an 8x8 image, and the trigger works at one of
    the 16 places where they land.
    """
    original = Predictor(wrap(backdoored), SPEC, 10, "logits")
    copied = TrainableCopy.of(original)
    clean, triggered = digits.test.images(slice(None)), digits.triggered.images(slice(None))

    def lead() -> Tensor:
        """(N,): of the target over the best other label, in nats."""
        with torch.no_grad():
            logits = copied.answers()(triggered).cpu()
        others = logits.clone()
        others[:, ATTACK.target_label] = -math.inf
        led: Tensor = logits[:, ATTACK.target_label] - others.amax(dim=1)
        return led

    before = lead()
    assert float((before > 0.0).double().mean()) > 0.99
    settings = Dhbe(
        epochs=4,
        iterations=40,
        batch=32,
        rate=1e-2,  # no batch norm
        sample_rate=1e-5,  # in so short a game, G would only show the student triggers
        weight=1.0,
        patch=5,
        width=16,
        mean=(0.1,),
        std=(0.3,),
    )
    outcome = repair_by_dhbe(copied, original, settings, engine, seed=0)
    assert float(lead().mean()) < float(before.mean()) / 4.0
    assert float((lead() > 0.0).double().mean()) < 0.95
    alike = (copied.predictor(clean).argmax(dim=1) == original(clean).argmax(dim=1)).double().mean()
    assert float(alike) > 0.75
    assert outcome.agreement > 0.75
