"""What calibration finds out about how PyTorch runs a model, and when it does not trust it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration import Calibration, PrecisionChoice, Settings, calibrate
from calibration.data import ImageSet
from calibration.execution import fastest, why_not_reduced
from guard import Guard, InputSpec, Predictor
from guard.detectors import Strip
from guard.errors import CalibrationError, ModelError
from guard.predictors import Execution, wrap
from guard.predictors.module import ModuleBackend

SPEC = InputSpec(channels=3, height=8, width=8)


class Pixels(nn.Module):
    """Classes by the colour of a quadrant; quick with channels last, quicker in bfloat16, unless told otherwise."""

    def __init__(self, *, quick: bool = True, noise: float = 0.0, channels: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * channels, 4)
        self.quick, self.noise = quick, noise
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.linear(10.0 * nn.functional.avg_pool2d(images, 4).flatten(1))
        reduced = pooled.dtype == torch.bfloat16
        if self.noise and reduced:
            swing = torch.arange(len(images)) % 2 * self.noise
            pooled = pooled.float() * (1.0 + swing[:, None])
        return 2.0 * pooled

    def seconds(self, last: bool, reduced: bool) -> float:
        """What a pass takes."""
        return 0.04 / (1 + last + 2 * reduced) if self.quick else 0.02


class Sleeping(Pixels):
    """So long, in truth."""

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        time.sleep(self.seconds(images.stride(1) == 1, found.dtype == torch.bfloat16))
        return found


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does."""

    def timed(found: Predictor, _: Tensor) -> float:
        module = found.backend.module if isinstance(found.backend, ModuleBackend) else None
        assert isinstance(module, Pixels)
        return module.seconds(found.execution.memory_format == "channels-last", found.execution.precision == "bfloat16")

    monkeypatch.setattr("calibration.execution._timed", timed)


class Viewing(nn.Module):
    """Can't take channels last, as many a model."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.convolution(images)
        return found.view(len(images), -1)[:, :4]


def predictor(model: nn.Module) -> Predictor:
    return Predictor(wrap(model), SPEC, 4, "logits")


def clean(count: int = 260) -> ImageSet:
    return ImageSet((255.0 * torch.rand(count, 3, 8, 8)).to(torch.uint8))


def made(model: nn.Module, precision: PrecisionChoice) -> Calibration:
    return calibrate(model, clean(), Settings(overlays=10, frr=0.05, allow_missing_classes=True, precision=precision))


def test_what_is_clearly_faster_is_taken() -> None:
    images = torch.rand(5, 3, 8, 8)
    assert fastest(predictor(Sleeping()), images).execution == Execution(memory_format="channels-last")
    both = Execution(memory_format="channels-last", precision="bfloat16")
    assert fastest(predictor(Sleeping()), images, "auto").execution == both
    assert fastest(predictor(Sleeping(quick=False)), images, "auto").execution == Execution()


def test_channels_last_is_tried_of_one_channel_too() -> None:
    """Whose order in memory is the same, but for its strides."""
    found = Predictor(wrap(Sleeping(channels=1)), InputSpec(channels=1, height=8, width=8), 4, "logits")
    assert fastest(found, torch.rand(5, 1, 8, 8)).execution == Execution(memory_format="channels-last")


def test_a_model_that_can_not_take_channels_last_keeps_its_own() -> None:
    assert fastest(predictor(Viewing()), torch.rand(5, 3, 8, 8)).execution == Execution()


@pytest.mark.usefixtures("known_times")
def test_answers_stay_in_float32_and_the_profile_remembers(tmp_path: Path) -> None:
    model = Pixels()
    found = made(model, "bfloat16")
    assert found.turned is not None
    assert found.turned <= 0.005
    found.save(tmp_path / "profile")
    guard = Guard.load(tmp_path / "profile", model)
    (strip,) = (item.detector for item in guard.detectors)
    assert isinstance(strip, Strip)
    assert strip.predictor.execution == Execution(memory_format="channels-last", precision="bfloat16")
    assert guard.predictor.execution == Execution(memory_format="channels-last")
    images = torch.rand(4, 3, 8, 8)
    answers = torch.tensor([verdict.probabilities for verdict in guard(images)])
    torch.testing.assert_close(answers, predictor(model)(images), atol=1e-5, rtol=0.0)


@pytest.mark.usefixtures("known_times")
def test_bfloat16_that_turns_verdicts_is_refused_or_left() -> None:
    with pytest.raises(CalibrationError, match=r"at most 0\.5% of the verdicts on clean images, got [1-9]"):
        made(Pixels(noise=2.0), "bfloat16")
    left = made(Pixels(noise=2.0), "auto")
    assert left.execution.precision == "float32"
    assert left.turned is None
    assert left.predictor is left.strips[0].predictor
    assert re.fullmatch(r"channels last, float32; bfloat16 would turn \d+\.\d\d% of the verdicts", left.runs)
    assert made(Pixels(quick=False), "auto").runs == "contiguous, float32; bfloat16 is not clearly faster here"
    assert made(Pixels(quick=False), "float32").runs == ""


class Overflowing(Pixels):
    """Gives no answer to dark images in bfloat16."""

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        dark = images.flatten(1).amax(dim=1) < 0.5
        return found.masked_fill(dark[:, None], torch.nan) if found.dtype == torch.bfloat16 else found


@pytest.mark.usefixtures("known_times")
def test_bfloat16_that_fails_on_later_images_is_refused_or_left() -> None:
    images = clean()
    images = ImageSet(torch.cat([images.pixels[:40], images.pixels[40:] // 4]))  # the first ones are tried: they go well
    settings = Settings(overlays=10, frr=0.05, blend="mix", alpha=0.1, allow_missing_classes=True)
    with pytest.raises(CalibrationError, match="or leave --precision at float32"):
        calibrate(Overflowing(), images, msgspec.structs.replace(settings, precision="bfloat16"))
    left = calibrate(Overflowing(), images, msgspec.structs.replace(settings, precision="auto"))
    assert left.execution.precision == "float32"
    assert left.runs == "channels last, float32; bfloat16 gives answers that can't be used"


def test_bfloat16_is_refused_where_pytorch_does_not_run_the_model() -> None:
    function = replace(predictor(Pixels()), backend=wrap(lambda batch: batch[:, :4, 0, 0]))
    with pytest.raises(ModelError, match="expected a model that PyTorch runs for bfloat16, got one of kind callable"):
        fastest(function, torch.rand(2, 3, 8, 8), "bfloat16")
    assert fastest(function, torch.rand(2, 3, 8, 8), "auto") is function
    assert why_not_reduced(function) == "bfloat16 is for models that PyTorch runs"
