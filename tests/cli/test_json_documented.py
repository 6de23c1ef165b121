"""docs/json.md names the fields that commands print, all of them and no others."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from calibration.evaluation import Evaluation
from calibration.inspection.record import ScanRecord
from calibration.red_team import RedTeam
from calibration.repair.record import RepairRecord
from cli.check import Line
from tests.cli.conftest import Command, Files

DOCS = Path(__file__).parent.parent.parent / "docs" / "json.md"


def documented(command: str) -> set[str]:
    """The names in the first column of a command's table."""
    (section,) = re.findall(rf"## {command}\n(.*?)(?=\n## |\Z)", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return {
        name for line in section.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("guard check", Line),
        ("guard evaluate", Evaluation),
        ("guard red-team", RedTeam),
        ("guard scan", ScanRecord),
        ("guard repair", RepairRecord),
    ],
)
def test_fields_are_those_of_the_records(command: str, kind: type[msgspec.Struct]) -> None:
    assert documented(command) == set(kind.__struct_fields__)


def test_those_of_a_calibration(guard: Command, files: Files, tmp_path: Path) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--overlays", 10, "--out", tmp_path / "p", "--json")
    assert documented("guard calibrate") == {*run.lines[0], "repair", "red_team"}
