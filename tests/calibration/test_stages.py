"""How many blends a stage holds: more where a call takes long beside its passes, the same verdicts, and kept in the profile."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from calibration import PassesChoice, Settings, calibrate, stages
from calibration.data import ImageSet
from calibration.stages import stage_rows
from guard import Guard, Predictor
from guard.detectors import Boundaries, Strip
from guard.detectors.strip import STAGE_ROWS
from guard.errors import CalibrationError
from guard.predictors import wrap
from tests.toy import SPEC, ToyNet, toy_images

OVERLAYS = torch.rand(100, *SPEC.shape, generator=torch.Generator().manual_seed(0))
BOUNDARIES = Boundaries(votes=5, ends=(3, 100), accept=(0.5, 1.0), reject=(0.1, 1.0))


class Taking:
    """A model that takes so many seconds a call, and a row."""

    def __init__(self, call: float, row: float) -> None:
        self.call, self.row, self.calls = call, row, 0

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.call + self.row * len(batch))
        return torch.zeros(len(batch), 4)


def toy_clean(count: int) -> ImageSet:
    images, labels = toy_images(count)
    return ImageSet((images * 255).round().to(torch.uint8), labels)


def strip(model: object, boundaries: Boundaries | None = None) -> Strip:
    return Strip(Predictor(wrap(model), SPEC, 4, "logits"), OVERLAYS, boundaries=boundaries)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a call takes in passes, whatever else this machine does."""
    known = {"call": 1.0, "pass": 0.001}

    def seconds(some: Strip, image: Tensor) -> float:
        return known["pass"] * (known["call"] * len(some.stage_ends()) + len(some.overlays))

    monkeypatch.setattr(stages, "_seconds", seconds)
    return known


@pytest.mark.parametrize(
    ("call", "exact", "sequential"),
    [(0.0, 4, 4), (2.0, 4, 4), (8.0, 8, 4), (32.0, 16, 8), (130.0, 32, 16), (9e9, 64, 32)],
)
def test_the_dearer_a_call_the_more_blends_it_holds(times: dict[str, float], call: float, exact: int, sequential: int) -> None:
    times.update({"call": call, "pass": 1e-3 / max(1.0, call)})
    image = OVERLAYS[:1]
    assert (stage_rows(strip(ToyNet()), image), stage_rows(strip(ToyNet(), BOUNDARIES), image)) == (exact, sequential)
    assert stage_rows(replace(strip(ToyNet()), votes=5), image) == exact


def test_beside_a_slow_model_a_call_takes_nothing(times: dict[str, float]) -> None:
    times["pass"] = 1.0
    assert stage_rows(strip(ToyNet()), OVERLAYS[:1]) == STAGE_ROWS


def test_by_the_clock() -> None:
    """A model that takes 5 ms a call, and one that takes 2 a row."""
    by_call, by_row = Taking(0.005, 0.0), Taking(0.0, 0.002)
    for _ in range(2):
        assert stage_rows(strip(by_call), OVERLAYS[:1]) == 64
        assert stage_rows(strip(by_call, BOUNDARIES), OVERLAYS[:1]) == 32
    assert stage_rows(strip(by_row), OVERLAYS[:1]) <= 8


def test_hardly_anything_is_run_of_a_model_that_takes_seconds() -> None:
    slow = Taking(0.06, 0.0)
    stage_rows(strip(slow), OVERLAYS[:1])
    assert slow.calls == 1


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("passes", ["exact", "votes", "sequential"])
def test_longer_stages_turn_no_verdict(times: dict[str, float], passes: PassesChoice, tmp_path: Path) -> None:
    times["call"] = 500.0
    times["pass"] = 1e-6
    clean = toy_clean(900)
    settings = Settings(passes=passes, overlays=40, frr=0.05, allow_missing_classes=True)
    short, long = (calibrate(ToyNet(), clean, msgspec.structs.replace(settings, stage_rows=rows)) for rows in (1, None))
    assert [part.strips[0].stage_rows for part in (short, long)] == [1, 64 if passes != "sequential" else 32]
    assert short.thresholds == long.thresholds
    assert short.mean_passes < long.mean_passes  # of an image on its own, in the stages that it will go through
    images = clean.images(slice(0, 64))
    found = [part.strips[0].inspect(images, part.thresholds[0].value) for part in (short, long)]
    assert torch.equal(found[0].exceeds, found[1].exceeds)
    long.save(tmp_path / "guard")
    loaded = Guard.load(tmp_path / "guard", ToyNet()).detectors[0].detector
    assert isinstance(loaded, Strip)
    assert loaded.stage_rows == long.strips[0].stage_rows


def test_the_default_is_not_written_so_that_older_versions_read_it(times: dict[str, float]) -> None:
    settings = Settings(overlays=20, frr=0.05, allow_missing_classes=True)
    for call, expected in ((0.0, None), (32.0, 16)):
        times["call"] = call
        made = calibrate(ToyNet(), toy_clean(200), settings)
        assert msgspec.to_builtins(made.profile.detectors[0]).get("stage_rows") == expected


def test_a_stage_of_nothing_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^expected stage_rows of at least 1, or None to measure it, got 0$"):
        Settings(stage_rows=0)
