"""What is learnt from: each image once, and no clean one as a triggered one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration import ImageSet
from calibration.data import digests
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.repair.cases import clean_parts, load_quarantined, quarantined_parts
from calibration.sources import open_model
from guard import Quarantine
from guard.errors import InputError, QuarantineError, RepairError
from tests.calibration.repair.toys import factory, toys


def test_equal_images_count_once(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(factory(tmp_path), None, tmp_path).backend, toys(60))
    images = toys(40).images(slice(None))
    parts = quarantined_parts(images.repeat(5, 1, 1, 1), predictor, 0)
    assert len(parts) == 40
    learnt = {image.numpy().tobytes() for part in (parts.tuning, parts.stopping) for image in part.images}
    assert not [image for image in parts.held_out.images if image.numpy().tobytes() in learnt]
    with pytest.raises(RepairError, match="got 10 different ones that are not among the clean images, of 90: serve on"):
        quarantined_parts(images[:10].repeat(9, 1, 1, 1), predictor, 0)


def test_equal_clean_images_count_once(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(factory(tmp_path), None, tmp_path).backend, toys(60))
    twice = toys(60)
    twice = ImageSet(twice.pixels.repeat(2, 1, 1, 1), twice.known_labels.repeat(2))
    parts = clean_parts(twice, predictor, 0)
    assert len(parts) == 60
    learnt = set(digests(torch.cat([parts.tuning.images, parts.stopping.images])))
    assert learnt.isdisjoint(digests(parts.held_out.images))
    with pytest.raises(RepairError, match="got 30 different ones among 120: add images"):
        clean_parts(ImageSet(twice.pixels[:30].repeat(4, 1, 1, 1)), predictor, 0)


def test_clean_images_in_a_quarantine_are_known_to_be_false_alarms(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(factory(tmp_path), None, tmp_path).backend, toys(60))
    clean, rejected = digests(toys(60).images(slice(None))), toys(40, seed=7).images(slice(None))
    mixed = torch.cat([rejected, toys(30).images(slice(None))])
    parts = quarantined_parts(mixed, predictor, 0, frozenset(clean))
    found = digests(torch.cat([parts.tuning.images, parts.stopping.images, parts.held_out.images]))
    assert sorted(found) == sorted(digests(rejected))


def test_what_can_not_be_used_of_a_quarantine_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match="got an empty folder: nothing was rejected yet"):
        load_quarantined(tmp_path, (1, 8, 8))
    quarantine = Quarantine(tmp_path)
    for image in (torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), float("nan")), torch.full((1, 9, 9), 0.5)):
        quarantine.add(image, detector="strip", score=-0.01, threshold=-0.1, label_index=1, label="1")
    with pytest.raises(InputError, match=r"(NaN or Inf|is it another model's).*or pass --skip-unreadable"):
        load_quarantined(tmp_path, (1, 8, 8))
    found = load_quarantined(tmp_path, (1, 8, 8), skip_unreadable=True)
    assert len(found) == 1
    assert sorted(reason[:23] for _, reason in found.skipped) == ["expected finite pixels,", "expected quarantined im"]
