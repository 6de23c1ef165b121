"""`guard evaluate`: the agreed figures, each with its interval, and the counts behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cli.demonstration.digits import Digits
from tests.cli.conftest import Command, Files

FIGURES = (
    "clean_accuracy",
    "guarded_clean_accuracy",
    "attack_success_rate",
    "guarded_attack_success_rate",
    "frr",
    "far",
    "far_successful",
    "auroc",
)


def _few(path: Path, folder: Path) -> Path:
    loaded = np.load(path)
    np.savez(folder / path.name, x=loaded["x"][:60], y=loaded["y"][:60])
    return folder / path.name


def test_json(guard: Command, profile: Path, files: Files) -> None:
    run = guard("evaluate", profile, "--data", files.test, "--triggered", files.triggered, "--target", 7, "--json")
    assert run.code == 0
    (figures,) = run.lines
    for name in FIGURES:
        assert set(figures[name]) == {"value", "low", "high"}
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    assert figures["attack_success_rate"]["value"] >= 0.95
    assert figures["guarded_attack_success_rate"]["value"] <= 0.02
    assert figures["counts"]["clean"] == 500
    assert figures["counts"]["triggered"] == 450
    assert figures["frr"]["value"] == figures["counts"]["clean_rejected"] / 500


def test_without_an_attack(guard: Command, profile: Path, files: Files) -> None:
    (figures,) = guard("evaluate", profile, "--data", files.test, "--json").lines
    assert figures["attack_success_rate"] is None
    assert figures["speed"] == []
    assert figures["frr"]["value"] < 0.03


def test_speed(guard: Command, profile: Path, files: Files, tmp_path: Path) -> None:
    run = guard("evaluate", profile, "--data", files.test, "--speed", "--json", "--report", tmp_path / "r.html")
    (figures,) = run.lines
    alone, together = figures["speed"]
    assert (alone["at_once"], together["at_once"], together["images"]) == (1, 32, 256)
    for item in (alone, together):
        assert 0.0 < item["model_ms"] < item["guarded_ms"]
        assert 1.0 <= item["passes"] <= 100.0
    assert together["guarded_ms"] < alone["guarded_ms"]
    assert "guarded, ms an image" in (tmp_path / "r.html").read_text()


def test_table_and_report(guard: Command, profile: Path, files: Files, tmp_path: Path) -> None:
    run = guard(
        "evaluate",
        profile,
        "--data",
        _few(files.test, tmp_path),
        "--triggered",
        _few(files.triggered, tmp_path),
        "--target",
        7,
        "--speed",
        "--report",
        tmp_path / "r.html",
    )
    assert "FAR among successful attacks" in run.out
    assert "Speed, on this machine" in run.out
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in page
    assert "strip-" not in page


def test_the_report_of_a_pair_names_both(guard: Command, pair_profile: Path, files: Files, tmp_path: Path) -> None:
    assert guard("evaluate", pair_profile, "--data", _few(files.test, tmp_path), "--report", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "strip-logit" in page
    assert "strip-demeaned" in page


def test_target_and_labels_are_asked_for(guard: Command, profile: Path, files: Files, tmp_path: Path) -> None:
    assert "--target" in guard("evaluate", profile, "--data", files.test, "--triggered", files.triggered).problem
    np.savez(tmp_path / "t.npz", x=np.load(files.triggered)["x"])
    run = guard("evaluate", profile, "--data", files.test, "--triggered", tmp_path / "t.npz", "--target", 7)
    assert "true labels" in run.problem


def test_what_would_be_lost_or_ignored_is_refused_first(guard: Command, profile: Path, files: Files, tmp_path: Path) -> None:
    given = ("evaluate", profile, "--data", files.test)
    before = files.test.read_bytes()
    assert "--report as a file whose name ends in .html" in guard(*given, "--report", files.test).problem
    assert files.test.read_bytes() == before
    assert "expected --triggered with --target" in guard(*given, "--target", 3).problem


def test_files_that_cannot_be_read_are_left_out_where_that_is_asked(
    guard: Command, profile: Path, digits: Digits, tmp_path: Path
) -> None:
    for row, pixels in enumerate(digits.test.pixels[:30]):
        folder = tmp_path / "set" / str(int(digits.test.known_labels[row]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(folder / f"{row}.png")
    for label in range(10):
        (tmp_path / "set" / str(label)).mkdir(exist_ok=True)
    (tmp_path / "set" / "3" / "broken.png").write_bytes(b"nothing")
    assert "pass --skip-unreadable" in guard("evaluate", profile, "--data", tmp_path / "set").problem
    run = guard("evaluate", profile, "--data", tmp_path / "set", "--skip-unreadable", "--json")
    assert run.lines[0]["counts"]["clean"] == 30
    assert "skipped 3/broken.png" in run.err


def test_a_guard_that_lets_many_in_says_what_may_help(guard: Command, files: Files, profile: Path, tmp_path: Path) -> None:
    """Clean images in the place of triggered ones: hardly any is rejected."""
    test, attacked = (_few(path, tmp_path) for path in (files.test, files.triggered))
    for triggered, many in ((test, True), (attacked, False)):
        run = guard("evaluate", profile, "--data", test, "--triggered", triggered, "--target", 7)
        assert ("adds a filter" in run.err) == many
