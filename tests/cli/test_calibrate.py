"""`guard calibrate`: what it writes works, and what it refuses is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import calibration
from calibration import BlendChoice, DetectorChoice, Settings
from calibration.settings import strips
from cli.calibrate import _Blend, _Detector
from cli.demonstration.digits import Digits, save_exported
from guard import Guard
from guard.detectors import Blend
from guard.errors import CalibrationError
from guard.predictors import load_backend
from guard.profile import load_profile
from guard.records import StripRecord
from tests.cli.conftest import Command, Files
from tests.scans import corner, write_scan
from tests.toy import toy_images

FEW = ("--overlays", 20)
"""Where their number is no matter."""


def test_profile_moves_between_folders_and_guards(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "profile", "--json")
    assert run.code == 0
    summary = run.lines[0]
    assert summary["images"] == 497
    assert summary["frr_low"] < 0.01 < summary["frr_high"]
    assert (summary["frr"], summary["overlays"]) == (0.01, 100)
    (only,) = summary["detectors"]
    assert (only["name"], only["blend"], only["alpha"], only["overlays"], only["frr"]) == ("strip", "logit", 3.5, 100, 0.01)
    same = ("entropy_threshold", "frr_low", "frr_high")
    assert [summary[key] for key in same] == [only[key] for key in same]
    assert 2 < summary["mean_passes"] < 100
    assert summary["clean_accuracy"] > 0.9
    assert "superimposing clean images" in run.err  # progress
    shutil.move(tmp_path / "profile", tmp_path / "moved")
    verdicts = Guard.load(tmp_path / "moved")(digits.triggered.images(slice(0, 50)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_the_report_shows_the_distribution(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW)
    assert run.code == 0
    assert "next: guard check" in run.out
    assert "guard red-team estimates it" in run.err
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for said in ("bits", "superimposed by logit", "logit, alpha 3.5", "1.00%"):
        assert said in page
    assert "strip-" not in page


def test_a_pair_of_blends_is_two_detectors(tmp_path: Path, guard: Command, files: Files) -> None:
    options = ["--blend", "logit+demeaned", "--overlays", 40, "--json"]
    (summary,) = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *options).lines
    assert (summary["images"], summary["frr"], summary["overlays"]) == (557, 0.01, 40)
    first, second = summary["detectors"]
    assert [(item["name"], item["blend"], item["alpha"], item["overlays"], item["frr"]) for item in (first, second)] == [
        ("strip-logit", "logit", 3.5, 20, 0.005),
        ("strip-demeaned", "demeaned", 1.5, 20, 0.005),
    ]
    assert summary["entropy_threshold"] == first["entropy_threshold"] != second["entropy_threshold"]
    assert summary["frr_low"] == max(first["frr_low"], second["frr_low"])
    assert summary["frr_high"] == first["frr_high"] + second["frr_high"]
    page = (tmp_path / "p" / "report.html").read_text()
    for said in ("strip-logit", "strip-demeaned", "0.50%", "1.00%", "either of them"):
        assert said in page


def test_another_blend_is_one_detector_too(tmp_path: Path, guard: Command, files: Files) -> None:
    options = ["--blend", "demeaned", "--overlays", 20, "--json"]
    (summary,) = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *options).lines
    (only,) = summary["detectors"]
    assert (only["name"], only["blend"], only["alpha"], only["overlays"], only["frr"]) == ("strip", "demeaned", 1.5, 20, 0.01)
    assert [summary[key] for key in ("frr_low", "frr_high")] == [only[key] for key in ("frr_low", "frr_high")]
    page = (tmp_path / "p" / "report.html").read_text()
    assert "strip-" not in page


def test_sequential_passes_from_calibration_to_verdict(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    command = ["calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--passes", "sequential"]
    assert "by boundaries" in guard(*command).out
    assert "by boundaries" in (tmp_path / "p" / "report.html").read_text()
    (summary,) = guard(*command, "--json").lines
    assert summary["images"] == 197
    assert [item["passes"] for item in summary["detectors"]] == ["sequential"]
    for images, verdict, bound in ((digits.test, "accepted", "at least"), (digits.triggered, "rejected", "at most")):
        np.savez(tmp_path / "images.npz", x=images.pixels[:40, 0].numpy())
        lines = guard("check", tmp_path / "p", tmp_path / "images.npz", "--json").lines
        assert [line["verdict"] for line in lines].count(verdict) >= 38
        assert sum(line["passes"] for line in lines) < 40 * 25
        inexact = [line for line in lines if not line["entropy_exact"] and line["verdict"] == verdict]
        assert len(inexact) >= 20
        assert all((line["entropy"] > line["threshold"]) == (verdict == "accepted") for line in inexact)
        assert guard("check", tmp_path / "p", tmp_path / "images.npz").out.count(f"entropy {bound}") == len(inexact)


MIX = ["--detector", "strip", "--detector", "feature-squeezing", "--overlays", 20, "--frr", 0.06]


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Path:
    """Of the backdoored model, with its true trigger."""
    return write_scan(tmp_path_factory.mktemp("scans") / "scan", load_backend(files.model), {7: corner()})


def test_a_mix_of_detectors_from_calibration_to_verdict(
    tmp_path: Path, guard: Command, files: Files, scan: Path, digits: Digits
) -> None:
    given = ["calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *MIX, "--scan", scan]
    (summary,) = guard(*given, "--json").lines
    strip, squeezing, filtering = summary["detectors"]
    assert [item["name"] for item in (strip, squeezing, filtering)] == ["strip", "feature-squeezing", "activation-filter-7"]
    assert [item["frr"] for item in (strip, squeezing, filtering)] == pytest.approx([0.02] * 3)
    assert (summary["overlays"], summary["images"], summary["frr"]) == (20, 577, pytest.approx(0.06))
    assert summary["entropy_threshold"] == strip["entropy_threshold"]
    assert 0.0 < squeezing["threshold"] <= 2.0
    assert len(filtering["neurons"]) == 10
    shown = guard(*given).out
    for said in ("entropy threshold ", "change of the answer threshold ", "mean activation threshold, 7 ", " of 25 on average"):
        assert said in shown
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    for said in ("Entropy of clean images", "when they are squeezed", "Activation of the trigger", "any of them", "of 25"):
        assert said in page

    Image.fromarray(digits.triggered.pixels[0, 0].numpy()).save(tmp_path / "triggered.png")
    (line,) = guard("check", tmp_path / "p", tmp_path / "triggered.png", "--json").lines
    assert (line["verdict"], line["reason"]) == ("rejected", "backdoor-suspected")
    entropy, change, activation = line["findings"]
    assert "score" not in entropy
    assert (change["entropy"], change["suspicious"], activation["entropy"], activation["suspicious"]) == (
        None,
        False,
        None,
        True,
    )
    assert activation["score"] >= activation["threshold"] == filtering["threshold"]
    words = guard("check", tmp_path / "p", tmp_path / "triggered.png").out
    assert f"activation-filter-7 {activation['score']:.4f} (suspicious), 25 passes" in words

    judging = ["evaluate", tmp_path / "p", "--data", files.test, "--triggered", files.triggered, "--target", 7]
    run = guard(*judging, "--json", "--report", tmp_path / "r.html")
    assert run.code == 0, run.err
    (figures,) = run.lines
    assert figures["guarded_attack_success_rate"]["value"] <= 0.02
    assert figures["frr"]["low"] <= 0.06
    assert figures["auroc"]["value"] >= 0.95
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for said in ("Entropy of clean and triggered images", "activation-filter-7", f"{squeezing['threshold']:.6f}"):
        assert said in page


def test_feature_squeezing_alone(tmp_path: Path, guard: Command, files: Files) -> None:
    options = ["--detector", "feature-squeezing", "--frr", 0.04, "--json"]
    (summary,) = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *options).lines
    assert (summary["entropy_threshold"], summary["overlays"], summary["images"]) == (None, 0, 597)
    assert summary["mean_passes"] == 4.0
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "verlay" not in page
    run = guard("evaluate", tmp_path / "p", "--data", files.test, "--report", tmp_path / "r.html")
    assert run.code == 0


def test_detectors_that_can_not_be_calibrated(
    tmp_path: Path, guard: Command, files: Files, scan: Path, clean_twin: nn.Module, digits: Digits
) -> None:
    save_exported(clean_twin, digits.train.images(slice(0, 2)), tmp_path / "twin.pt2")
    nothing = write_scan(tmp_path / "nothing", load_backend(files.model), {})
    cases: list[tuple[Path, list[object], str]] = [
        (tmp_path / "twin.pt2", ["--scan", scan], "is of another model (SHA-256 differs)"),
        (files.model, ["--scan", nothing], "found no infected label"),
        (files.model, ["--scan", tmp_path], "expected a scan's folder with scan.json"),
        (files.model, ["--scan", scan, "--frr", 0.003], "0.003 for 2 detectors together needs at least 666 clean images"),
        (files.model, ["--scan", scan, "--red-team"], "expected --red-team with STRIP alone"),
        (files.model, ["--detector", "feature-squeezing", "--red-team"], "expected --red-team with STRIP alone"),
        (
            files.model,
            ["--detector", "feature-squeezing", "--blend", "add", "--passes", "exact"],
            "expected --blend and --passes with --detector strip",
        ),
        (files.model, ["--passes", "sequential", "--overlays", 200], "at least 399 clean images besides the overlays"),
        (files.model, ["--detector", "strip", "--detector", "strip"], "expected each detector once"),
        (files.model, ["--detector", "magic"], "magic"),
    ]
    for model, options, message in cases:
        run = guard("calibrate", model, "--data", files.clean, "--out", tmp_path / "p", *options)
        assert message in run.problem
        assert not (tmp_path / "p").exists()


def test_the_detectors_are_those_of_the_settings(guard: Command) -> None:
    assert tuple(item.value for item in _Detector) == get_args(DetectorChoice)
    told = " ".join(guard("calibrate", "--help").out.replace("│", " ").split())
    assert "blind to patches" in told


def test_the_blends_are_those_of_the_settings(guard: Command) -> None:
    assert get_args(_Blend) == get_args(BlendChoice)
    assert set(get_args(BlendChoice)) == {*get_args(Blend), "logit+demeaned"}
    assert f"[default: ({Settings().blend})]" in guard("calibrate", "--help").out


def test_a_folder_of_images_does_as_well(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    labels = digits.clean.known_labels.tolist()
    for row, label in enumerate(labels):
        folder = tmp_path / "clean" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.clean.pixels[row, 0].numpy()).save(folder / f"{row:04d}.png")
    (tmp_path / "clean" / "3" / "notes.png").write_text("no picture")
    refused = guard("calibrate", files.model, "--data", tmp_path / "clean", "--out", tmp_path / "p")
    assert "1 of 598 files can't be read, first 3/notes.png" in refused.problem
    assert not (tmp_path / "p").exists()
    given = ("calibrate", files.model, "--data", tmp_path / "clean", "--out", tmp_path / "p", *FEW)
    run = guard(*given, "--skip-unreadable", "--json")
    assert run.lines[0]["skipped"][0]["file"] == "3/notes.png"
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["input"]["class_names"][3] == "3"


def test_factory_with_weights(tmp_path: Path, guard: Command, files: Files, backdoored: nn.Module, digits: Digits) -> None:
    save_file(backdoored.state_dict(), tmp_path / "w.safetensors")
    name = "cli.demonstration.digits:digit_net"
    out = tmp_path / "p"
    given = ("calibrate", name, "--weights", tmp_path / "w.safetensors", "--data", files.clean, "--out", out)
    assert guard(*given, *FEW).code == 0
    (tmp_path / "w.safetensors").unlink()
    verdicts = Guard.load(out)(digits.triggered.images(slice(0, 20)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_normalisation_is_recorded(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--mean", "0.1", "--std", "0.9")
    assert run.code == 0
    stored = json.loads((tmp_path / "p" / "guard.json").read_text())["input"]
    assert (stored["mean"], stored["std"]) == ([0.1], [0.9])


def test_wrong_normalisation_warns(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--mean", "-40", "--std", "9")
    assert run.code == 2 or "near chance" in run.err


def test_labels_that_are_often_wrong_are_worth_a_word(tmp_path: Path, guard: Command, files: Files) -> None:
    """Half of the labels are of another order: far from chance, and no model that anybody deploys."""
    clean = np.load(files.clean)
    labels = np.where(clean["y"] < 5, 4 - clean["y"], clean["y"])
    np.savez(tmp_path / "clean.npz", x=clean["x"], y=labels)
    said = "note: if the model is known to be right on more than 5"
    for data, told in ((tmp_path / "clean.npz", True), (files.clean, False)):
        run = guard("calibrate", files.model, "--data", data, "--out", tmp_path / "p", *FEW)
        assert (run.code, said in run.err) == (0, told)


PROBLEMS: list[tuple[list[str], str]] = [
    (["--frr", "0.0001"], "rate of 0.0001 needs at least 9999 clean images"),
    (["--frr", "0.0001", "--blend", "logit+demeaned"], "0.0001 for 2 blends together needs at least 19999 clean images"),
    (["--frr", "2"], "between 0 and 1"),
    (["--overlays", "597"], "more clean images than the 597 overlays"),
    (["--overlays", "1"], "at least 2 overlays"),
    (["--overlays", "3", "--blend", "logit+demeaned"], "at least 4 overlays for logit+demeaned"),
    (["--alpha", "0"], "expected alpha"),
    (["--alpha", "0.7", "--blend", "logit+demeaned"], "name one, like --blend logit, or drop --alpha"),
    (["--mean", "a,b"], "expected --mean as numbers"),
    (["--mean", "0.5,0.5,0.5", "--std", "1,1,1"], "expected 1 values of mean"),
    (["--mean", "0.5"], "expected --std with --mean, got --mean alone"),
    (["--std", "0.5"], "expected --mean with --std, got --std alone"),
    (["--preprocess", "gym"], "--max-accuracy-drop"),
    (["--tripwire-weights", "w.safetensors"], "expected --tripwire with --tripwire-weights"),
    (["--max-accuracy-drop", "1"], "expected --preprocess or --repair with --max-accuracy-drop"),
    (["--confidence", "1.5"], "expected a confidence between 0 and 1"),
    (["--method", "normal", "--confidence", "0.9"], "conformal method only"),
    (["--blend", "mix", "--alpha", "2"], "alpha in (0, 1] for mix"),
    (["--shape", "1,9,9"], "expected images of shape"),
    (["--shape", "9"], "expected --shape as C,H,W"),
    (["--output", "labels"], "expected"),
    (["--blend", "lighten"], "lighten"),
]


@pytest.mark.parametrize(("options", "message"), PROBLEMS)
def test_bad_options_are_one_line(tmp_path: Path, guard: Command, files: Files, options: list[str], message: str) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *options)
    assert message in run.problem
    assert not (tmp_path / "p").exists()


def test_equal_images_count_once(tmp_path: Path, guard: Command, digits: Digits, files: Files) -> None:
    """Or a rate would be set by fewer images than it says."""
    clean = digits.clean.select(torch.arange(300))
    twice, once = (tmp_path / name for name in ("twice.npz", "once.npz"))
    np.savez(once, x=clean.pixels.numpy(), y=clean.known_labels.numpy())
    np.savez(twice, x=clean.pixels.repeat(2, 1, 1, 1).numpy(), y=clean.known_labels.repeat(2).numpy())
    options = ("--overlays", 20, "--json")
    first, second = (
        guard("calibrate", files.model, "--data", data, "--out", tmp_path / data.stem, *options) for data in (once, twice)
    )
    assert first.lines[0]["images"] == second.lines[0]["images"] == 280
    assert "300 of 600 clean images equal others" in second.err
    few = guard("calibrate", files.model, "--data", twice, "--out", tmp_path / "p", "--frr", 0.003, "--overlays", 20)
    assert "needs at least 333 clean images besides the overlays, got 280" in few.problem


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


def test_bad_models_are_one_line(tmp_path: Path, guard: Command, files: Files) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "model.h5").write_bytes(b"x")
    cases = {
        tmp_path / "none.onnx": "no such file",
        tmp_path / "checkpoint.pt": "nothing is unpickled",
        tmp_path / "empty.onnx": "does not load",
        tmp_path / "model.h5": "nothing else is loaded",
        "no.such.package:thing": "importable",
    }
    for model, message in cases.items():
        assert message in guard("calibrate", model, "--data", files.clean, "--out", tmp_path / "p").problem


def test_other_peoples_folders_are_not_overwritten(tmp_path: Path, guard: Command, files: Files) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("hello")
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "letters")
    assert "holds something else" in run.problem
    assert (tmp_path / "letters" / "dear.txt").read_text() == "hello"


def test_calibrating_again_replaces_the_profile(tmp_path: Path, guard: Command, files: Files) -> None:
    for frr in ("0.01", "0.02"):
        assert guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--frr", frr).code == 0
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["detectors"][0]["threshold"]["frr"] == 0.02
    assert [item.name for item in tmp_path.iterdir()] == ["p"]


TOY = "tests.toy:LearningToy"
NO_WEIGHTS = "tests.toy:ToyNet"


def toy_folder(path: Path, side: int = 8) -> Path:
    """The toy's images, the first one `side` wide."""
    images, labels = toy_images(60)
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
        (picture.resize((side, 8)) if row == 0 else picture).save(path / str(label) / f"{row}.png")
    return path


QUICK = ("--overlays", 8, "--frr", 0.05)


def test_resized_images_are_told(tmp_path: Path, guard: Command) -> None:
    data, out = toy_folder(tmp_path / "clean", side=11), tmp_path / "p"
    remark = "1 of 60 images were of another size than 8x8 and were resized: serving and guard check refuse such images unless"
    shaped = ("calibrate", NO_WEIGHTS, "--data", data, "--out", out, "--shape", "1,8,8", *QUICK, "--json")
    run = guard(*shaped)
    assert remark in run.err
    assert len(run.lines) == 1
    assert remark in guard("evaluate", out, "--data", data, "--json").err
    assert "another size" not in guard(*shaped, "--resize").err
    assert "another size" not in guard("evaluate", out, "--data", data, "--json").err


def test_names_that_are_not_utf_8(tmp_path: Path, guard: Command) -> None:
    data, odd = toy_folder(tmp_path / "clean"), os.fsdecode(b"caf\xe9")
    (data / "0" / f"{odd}.png").write_bytes(b"nothing")
    given = ("calibrate", NO_WEIGHTS, "--data", data, *QUICK, "--skip-unreadable", "--out")
    run = guard(*given, tmp_path / "p", "--json")
    assert run.lines[0]["skipped"][0]["file"] == "0/caf\\xe9.png"
    assert "expected a folder whose name is UTF-8" in guard(*given, tmp_path / odd, "--json").problem
    (data / odd).mkdir()
    assert "expected class folders with names in UTF-8" in guard(*given, tmp_path / "p").problem
    assert sorted(item.name for item in tmp_path.iterdir()) == ["clean", "p"]


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


class SmallConvNet(nn.Sequential):
    """An MNIST-sized network with random weights; only its cost matters here."""

    def __init__(self) -> None:
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
        torch.random.set_rng_state(generator)


@pytest.mark.slow
def test_a_thousand_images_take_less_than_thirty_seconds(tmp_path: Path, guard: Command) -> None:
    rng = np.random.default_rng(0)
    for row in range(1000):
        folder = tmp_path / "clean" / str(row % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{row}.png")
    started = time.monotonic()
    run = guard("calibrate", "tests.cli.test_calibrate:SmallConvNet", "--data", tmp_path / "clean", "--out", tmp_path / "p")
    assert run.code == 0
    assert time.monotonic() - started < 30
    assert "1000/1000" in run.err
    assert "900/900" in run.err
