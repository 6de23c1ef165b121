"""The demo without TorchServe (with it, `make demo` is its own test): its figures, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.demonstration import run as demonstration
from cli.demonstration.digits import Digits
from guard.errors import RepairError
from tests.cli.conftest import Command, Run, guard

__all__ = ["guard"]  # the fixture


def test_the_demo_reaches_its_figures(tmp_path: Path, guard: Command) -> None:
    run: Run = guard("demo", "--engine", "asgi", "--out", tmp_path / "demo", "--model-store", tmp_path / "store")
    assert run.code == 0, run.err
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["attack_success_unguarded"] >= 0.95
    assert result["attack_success_guarded"] <= 0.02
    assert result["clean_rejected"] <= 0.03
    assert result["median_passes_clean"] < 50 < result["median_passes_triggered"] <= 100
    assert result["repair"]["old_answer_kept"] <= 0.05
    assert result["repair"]["clean_accuracy_after"] >= result["repair"]["clean_accuracy_before"] - 0.03
    assert "attack success" in run.out
    assert "rejected images that keep their old answer" in run.out
    for name in (
        "report.html",
        "entropy.png",
        "profile/guard.json",
        "clean.npz",
        "images/triggered-0.png",
        "repaired-profile/guard.json",
    ):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    checked = guard("check", tmp_path / "demo" / "profile", tmp_path / "demo" / "images", "--json")
    by_kind = {kind: [line["verdict"] for line in checked.lines if kind in line["image"]] for kind in ("clean", "triggered")}
    assert by_kind["triggered"] == ["rejected"] * 5
    assert by_kind["clean"].count("accepted") >= 4


def test_a_repair_that_is_refused_spoils_nothing_else(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise RepairError("the repair costs 4.0 points")

    monkeypatch.setattr(demonstration, "repair_digits", refused)
    assert demonstration._repair(digits, tmp_path, tmp_path, 0) is None
    assert "no repair: the repair costs 4.0 points" in capsys.readouterr().err
