"""STRIP's benchmark: what a probe holds, and the rate among triggers that show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.reports import markdown
from benchmarks.strip import Probe, far_where_it_shows
from calibration import ImageSet
from calibration.attacks import BadNets, Patch
from calibration.evaluation import Judged


def a_probe(levels: list[int]) -> Probe:
    """Uniform grey images of these levels, 0 to 255, each with a white patch on a quarter of it."""
    pixels = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    images = ImageSet(pixels.clone(), torch.ones(len(levels), dtype=torch.int64))
    return Probe.of(BadNets(0, patches=(Patch.rectangle(2),)), images, images, torch.zeros(len(levels), dtype=torch.int64))


def judged(answers: list[int], rejected: list[bool]) -> Judged:
    scores = np.zeros((1, len(answers)), dtype=np.float32)
    return Judged(torch.tensor(answers), torch.tensor(rejected), scores[0].astype(np.float64), scores)


def test_a_white_patch_changes_white_images_not_at_all() -> None:
    probe = a_probe([255, 0, 51])
    assert probe.change.tolist() == [0.0, 0.25, 0.2]
    assert float(probe.triggered.images(slice(None))[1].sum()) == 4.0


def test_only_successful_attacks_whose_trigger_shows_count() -> None:
    probe = a_probe([255, 200, 0, 0, 0, 0])
    rate = far_where_it_shows(judged([0, 0, 0, 0, 0, 7], [False, False, True, True, False, False]), probe)
    assert rate is not None
    assert rate.value == 1 / 3


def test_without_any_there_is_no_rate() -> None:
    assert far_where_it_shows(judged([7, 7], [False, False]), a_probe([0, 0])) is None


def test_a_table_has_a_cell_under_every_heading() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="expected 2 cells a row"):
        markdown(["a", "b"], [["1"]])
