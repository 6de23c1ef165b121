"""`guard repair --method auto`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from calibration import ImageSet
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from cli.demonstration.digits import Digits
from guard import Predictor
from tests.cli.conftest import Command


@pytest.fixture
def model(tmp_path: Path, small_trigger: nn.Module) -> Path:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(small_trigger, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


@pytest.fixture
def clean(tmp_path: Path, digits: Digits) -> Path:
    np.savez(tmp_path / "clean.npz", x=digits.clean.pixels[:, 0].numpy(), y=digits.clean.known_labels.numpy())
    return tmp_path / "clean.npz"


def test_what_was_chosen_is_written_and_told(
    tmp_path: Path, model: Path, clean: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fine_tuned(predictor: Predictor, clean: ImageSet, settings: RepairSettings, *_: object, **how: Any) -> Repaired:
        made = repair(predictor, clean, msgspec.structs.replace(settings, method="fine-tune"), **how)
        return replace(made, figures=msgspec.structs.replace(made.figures, said=("Chosen automatically: as a test.",)))

    monkeypatch.setattr("calibration.repair.work.repair_automatically", fine_tuned)
    out = tmp_path / "repaired"
    run = guard("repair", model, "--method", "auto", "--data", clean, "--epochs", 1, "--max-accuracy-drop", 100, "--out", out)
    assert run.code == 0, run.err
    assert "Chosen automatically: as a test." in run.err
    record = json.loads((out / "repair.json").read_text())
    assert record["method"] == "fine-tune"
    assert b"Chosen automatically" in (out / "report.html").read_bytes()


@pytest.mark.slow
def test_from_a_backdoored_model_to_one_that_was_verified(tmp_path: Path, model: Path, clean: Path, guard: Command) -> None:
    out = tmp_path / "repaired"
    run = guard("repair", model, "--method", "auto", "--data", clean, "--out", out)
    assert run.code == 0, run.err
    assert "Chosen automatically: a scan finds label 3 infected" in run.err
    assert "labels that a rescan finds infected" in run.out
    verified = json.loads((out / "repair.json").read_text())["verification"]
    assert verified["rescan_infected"] == []
    assert verified["recovered_success"][0] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected images of 28 to 64 pixels a side for dhbe, got 8x8"),  # its file says the shape
        (["--shape", "1,8,8", "--scan", "scanned"], "expected --data CLEAN with --scan"),
        (["--data", "clean.npz", "--devices", 2], "expected --devices with a method of repair, got --method auto"),
        (["--data", "clean.npz", "--edge", "https://edge"], "expected --method gym or codefend with --edge, got auto"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, model: Path, clean: Path, guard: Command, arguments: list[object], problem: str
) -> None:
    given = [tmp_path / item if item == "clean.npz" else item for item in arguments]
    run = guard("repair", model, "--method", "auto", *given, "--out", tmp_path / "repaired")
    assert run.code == 2
    assert problem in run.problem
    assert not (tmp_path / "repaired").exists()
