"""A repair is shown below the model that it repaired, not below another training of the same victim."""

from __future__ import annotations

from msgspec.structs import replace

from benchmarks.repairs import load_reports, table


def test_a_victim_trained_again_has_its_own_line_and_its_repairs_below() -> None:
    first, second, third = [report for report in load_reports() if report.victim == "gtsrb-b"][:3]
    accuracy = replace(first.before.marks.accuracy, value=0.5)
    other = replace(first.before, marks=replace(first.before.marks, accuracy=accuracy))

    rows = table([first, replace(second, before=other), third]).splitlines()[2:]

    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [
        ["**gtsrb-b**", "none"],
        ["", first.method],
        ["", third.method],
        ["**gtsrb-b**, trained again", "none"],
        ["", second.method],
    ]
    assert "50.00%" in rows[3]
