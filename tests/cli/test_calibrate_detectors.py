"""`guard calibrate` with other detectors than the default, up to the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from torch import nn

from calibration import BlendChoice, DetectorChoice, Settings
from cli.calibrate import _Blend, _Detector
from cli.demonstration.digits import Digits, save_exported
from guard.detectors import Blend
from guard.predictors import load_backend
from tests.cli.conftest import Command, Files
from tests.scans import corner, write_scan


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


def test_a_normal_fit_that_misses_the_rate_warns(tmp_path: Path, guard: Command, files: Files) -> None:
    command = ["calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p"]
    assert "normally distributed" not in guard(*command).err
    warned = guard(*command, "--method", "normal", "--blend", "add").err
    assert "warning: 1.00% false rejections are asked for, " in warned
    assert "clean scores are not normally distributed; --method conformal keeps to the rate" in warned


def test_sequential_passes_from_calibration_to_verdict(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    command = ["calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--passes", "sequential"]
    assert "by boundaries" in guard(*command).out
    page = (tmp_path / "p" / "report.html").read_text()
    for said in ("Inputs whose soft votes come to fewer than 5, of 100 clean images", "the votes so far leave little doubt"):
        assert said in page
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


def test_votes_from_calibration_to_verdict(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    command = ["calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--passes", "votes"]
    assert "by 5 votes of 100" in guard(*command).out
    assert "when 5 of 100 overlays have voted for the input" in (tmp_path / "p" / "report.html").read_text()
    (summary,) = guard(*command, "--json").lines
    assert [(item["passes"], item["votes"]) for item in summary["detectors"]] == [("votes", 5)]
    for images, verdict in ((digits.test, "accepted"), (digits.triggered, "rejected")):
        np.savez(tmp_path / "images.npz", x=images.pixels[:40, 0].numpy())
        lines = guard("check", tmp_path / "p", tmp_path / "images.npz", "--json").lines
        assert [line["verdict"] for line in lines].count(verdict) >= 38
        assert all((line["entropy"] > line["threshold"]) == (line["verdict"] == "accepted") for line in lines)


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
    options = ["--detector", "feature-squeezing", "--frr", 0.2, "--json"]
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
        (files.model, ["--passes", "votes", "--overlays", 9], "at least 10 overlays for --passes votes, got 9"),
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
