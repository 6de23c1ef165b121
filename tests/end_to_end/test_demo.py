"""The demo without TorchServe (with it, `make demo` is its own test): its figures, what it leaves behind, and what follows."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.demonstration import run as demonstration
from cli.demonstration.digits import Digits
from guard import Guard
from guard.errors import RepairError
from tests.cli.conftest import Command, Files, files, guard

__all__ = ["files", "guard"]  # fixtures


@dataclass(frozen=True)
class Demo:
    """Its folder, and what it said."""

    folder: Path
    said: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run once: it trains, serves and repairs."""
    place = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-P", "-m", "cli.main", "demo", "--engine", "asgi"]
    command += ["--out", str(place / "demo"), "--model-store", str(place / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return Demo(place / "demo", done.stdout)


def test_the_demo_reaches_its_figures(demo: Demo, guard: Command) -> None:
    result = json.loads((demo.folder / "result.json").read_text())
    assert result["attack_success_unguarded"] >= 0.95
    assert result["attack_success_guarded"] <= 0.02
    assert result["clean_rejected"] <= 0.03
    assert result["median_passes_clean"] < 50 < result["median_passes_triggered"] <= 100
    assert result["repair"]["old_answer_kept"] <= 0.05
    assert result["repair"]["clean_accuracy_after"] >= result["repair"]["clean_accuracy_before"] - 0.03
    assert "attack success" in demo.said
    assert "rejected images that keep their old answer" in demo.said
    for name in (
        "report.html",
        "entropy.png",
        "profile/guard.json",
        "clean.npz",
        "images/triggered-0.png",
        "repaired-profile/guard.json",
    ):
        assert (demo.folder / name).stat().st_size > 0
    checked = guard("check", demo.folder / "profile", demo.folder / "images", "--json")
    by_kind = {kind: [line["verdict"] for line in checked.lines if kind in line["image"]] for kind in ("clean", "triggered")}
    assert by_kind["triggered"] == ["rejected"] * 5
    assert by_kind["clean"].count("accepted") >= 4


def test_what_the_other_commands_make_of_its_repair(
    demo: Demo, tmp_path: Path, files: Files, digits: Digits, guard: Command
) -> None:
    model, repaired = demo.folder / "model.pt2", demo.folder / "repaired"
    assert sorted(path.name for path in repaired.iterdir()) == ["learnt.json", "model.pt2", "repair.json", "report.html"]
    assert b"The trigger that was learnt" in (repaired / "report.html").read_bytes()
    run = guard("calibrate", repaired, "--tripwire", model, "--data", files.clean, "--out", tmp_path / "profile", "--json")
    assert run.code == 0, run.err
    assert run.lines[0]["clean_accuracy"] >= 0.9
    assert run.lines[0]["tripwire"] is True
    record = json.loads((repaired / "repair.json").read_text())
    learnt = record["clean_images"] - record["held_out_clean"]
    assert 0.5 * learnt <= run.lines[0]["learnt_images"] <= learnt  # the others have become overlays of the tripwire
    answers = Guard.load(tmp_path / "profile").answer(digits.triggered.images(slice(None))).argmax(dim=1)
    assert float((answers == digits.triggered.known_labels).double().mean()) >= 0.8
    run = guard("evaluate", tmp_path / "profile", "--data", files.test, "--triggered", files.triggered, "--target", 7, "--json")
    assert run.lines[0]["far"]["value"] <= 0.05  # the original goes on detecting
    assert run.lines[0]["attack_success_rate"]["value"] <= 0.05  # and the repaired model answers
    sparing = ("--overlays", 20, "--frr", 0.2)
    run = guard("calibrate", repaired, "--red-team", "--data", files.clean, "--out", tmp_path / "p", *sparing, "--json")
    assert "--red-team takes 59 of 119 clean images" in run.problem  # that the repair has not seen


def test_a_repair_that_is_refused_spoils_nothing_else(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise RepairError("the repair costs 4.0 points")

    monkeypatch.setattr(demonstration, "repair_digits", refused)
    assert demonstration._repair(digits, tmp_path, tmp_path, 0) is None
    assert "no repair: the repair costs 4.0 points" in capsys.readouterr().err
