"""`guard calibrate --red-team`: who sees which images, and what stops it before its work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import calibration
from calibration.settings import strips
from guard.errors import CalibrationError
from guard.profile import load_profile
from guard.records import StripRecord
from tests.cli.conftest import Command, Files
from tests.toy import toy_images


def test_what_would_stop_calibration_stops_it_before_the_red_team(tmp_path: Path, guard: Command, files: Files) -> None:
    options = ("--data", files.clean, "--overlays", 50, "--red-team")
    cases = (
        (("--out", files.model / "p"), "is no folder; pick another --out"),
        (("--out", tmp_path / "p", "--preprocess", "gym"), "--max-accuracy-drop"),
    )
    for wrong, message in cases:
        run = guard("calibrate", files.model, *options, *wrong)
        assert message in run.problem
        assert "planting" not in run.err


TOY = "tests.toy:LearningToy"


def toy_pixels(path: Path, count: int) -> Path:
    images, labels = toy_images(count)
    np.savez(path, x=(images[:, 0] * 255).round().numpy().astype(np.uint8), y=labels.numpy())
    return path


def contents(pixels: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in pixels}


def test_with_a_red_team_the_threshold_is_set_on_images_that_it_never_saw(
    tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, calibration.ImageSet] = {}
    red_team, calibrate = calibration.red_team, calibration.calibrate

    def seen_by_red_team(predictor: Any, clean: calibration.ImageSet, *rest: Any, **options: Any) -> calibration.RedTeam:
        given["red team"] = clean
        return red_team(predictor, clean, *rest, **options)

    def seen_by_calibrate(model: Any, clean: calibration.ImageSet, *rest: Any, **options: Any) -> calibration.Calibration:
        given["calibrate"] = clean
        return calibrate(model, clean, *rest, **options)

    monkeypatch.setattr(calibration, "red_team", seen_by_red_team)
    monkeypatch.setattr(calibration, "calibrate", seen_by_calibrate)
    data = toy_pixels(tmp_path / "clean.npz", 440)
    run = guard("calibrate", TOY, "--data", data, "--out", tmp_path / "p", "--overlays", 16, "--red-team", "--json")
    assert run.code == 0
    chose, thresholds = (contents(given[name].pixels) for name in ("red team", "calibrate"))
    assert (len(chose), len(thresholds), len(chose | thresholds)) == (220, 220, 440)
    profile, arrays = load_profile(tmp_path / "p")
    records = [record for record in profile.detectors if isinstance(record, StripRecord)]
    overlays = set().union(*(contents(arrays[record.array]) for record in records))
    assert overlays <= thresholds

    found = msgspec.json.decode((tmp_path / "p" / "red_team.json").read_bytes(), type=calibration.RedTeam)
    chosen = found.chosen
    assert tuple((record.blend, record.alpha) for record in records) == strips(chosen.blend, chosen.alpha)
    assert len(overlays) == chosen.overlays
    assert {record.threshold.images for record in profile.detectors} == {220 - chosen.overlays}
    summary = run.lines[0]["red_team"]
    assert (summary["blend"], summary["alpha"], summary["overlays"]) == (chosen.blend, chosen.alpha, chosen.overlays)
    assert [plant["name"] for plant in summary["planted"]] == [plant.name for plant in found.planted]
    square = summary["planted"][0]
    assert 0.0 <= square["far_low"] <= square["far"] <= square["far_high"] <= 1.0
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "no guarantee for other attacks" in page
    assert "white square" in page

    again = guard("calibrate", TOY, "--data", data, "--out", tmp_path / "p", "--overlays", 16)  # over a red team's profile
    assert again.code == 0
    assert not (tmp_path / "p" / "red_team.json").exists()


def test_what_would_stop_calibration_stops_before_the_red_teams_work(
    tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*anything: Any, **options: Any) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr(calibration, "red_team", work)
    data, out = toy_pixels(tmp_path / "clean.npz", 440), tmp_path / "p"
    images, labels = toy_images(440)
    few = tmp_path / "few.npz"
    np.savez(few, x=images[:, 0].numpy(), y=torch.where(torch.arange(440) == 7, 3, labels.remainder(3)).numpy())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("hello")
    cases: list[tuple[list[object], str]] = [
        (["--blend", "max"], "expected --red-team or --blend, got both"),
        (["--alpha", "1"], "expected --red-team or --alpha, got both"),
        (["--blend", "add", "--alpha", "1"], "--blend and --alpha, got both"),
        (
            ["--overlays", "100"],
            "takes 220 of 440 clean images for itself and leaves 220, which is too few.*at least 300 clean",
        ),
        (["--overlays", "8", "--confidence", "0.95"], "leaves 220, which is too few.*at least 299 clean images besides"),
        (["--data", few, "--overlays", "8"], "expected clean images of all 4 classes"),
        (["--out", tmp_path / "letters", "--overlays", "8"], "holds something else"),
    ]
    for options, message in cases:
        problem = guard("calibrate", TOY, "--data", data, "--out", out, "--red-team", *options).problem
        assert re.search(message, problem), problem
    assert not out.exists()


def test_the_red_team_is_asked_only_for_what_can_be_calibrated_afterwards(
    tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def note(*anything: Any, candidates: list[tuple[str, float | None]], **options: Any) -> None:
        asked.append([blend for blend, _ in candidates])
        raise CalibrationError("that will do")

    monkeypatch.setattr(calibration, "red_team", note)
    data = toy_pixels(tmp_path / "clean.npz", 440)
    for options in ([], ["--confidence", 0.7]):  # 204 images: the pair needs 199, and with confidence 379
        run = guard("calibrate", TOY, "--data", data, "--out", tmp_path / "p", "--overlays", 16, "--red-team", *options)
        assert "that will do" in run.problem
    assert [("logit+demeaned" in blends, "logit" in blends) for blends in asked] == [(True, True), (False, True)]


def test_the_red_team_needs_a_model_that_can_be_trained(tmp_path: Path, guard: Command) -> None:
    data = toy_pixels(tmp_path / "clean.npz", 440)
    run = guard("calibrate", "tests.toy:ToyNet", "--data", data, "--out", tmp_path / "p", "--overlays", 8, "--red-team")
    assert "got one without weights" in run.problem
