"""What is said, and drawn, of a scan's findings."""

from __future__ import annotations

import msgspec
import pytest

from calibration.inspection.figures import candidate_table, limits, remarks, title
from calibration.inspection.record import LabelFinding, ScanFigures, SecondOpinion
from calibration.inspection.report import sizes_figure
from tests.scans import patch_finding


def findings(sizes: list[float], infected: int | None = None) -> tuple[LabelFinding, ...]:
    return tuple(
        LabelFinding(
            label_index=row,
            label=None,
            source_index=None,
            anomaly_index=0.0,
            mask_l1=size,
            success=1.0,
            passes=32,
            infected_by_index=row == 1,
            candidate=row < 3,
            second_opinion=SecondOpinion(
                size_ratio=0.2,
                spread=0.1,
                success=1.0,
                reference_l1=9.0,
                reference_ratio=1.0,
                reference_success=0.0,
                infected=row == infected,
            )
            if row < 3
            else None,
            infected=row == infected,
        )
        for row, size in enumerate(sizes)
    )


def figures() -> ScanFigures:
    """Label 0 is infected; the index accuses 1."""
    return ScanFigures(
        infected=True,
        labels=findings([1.0, 9.0, 9.0, 9.0], 0),
        pairs=(),
        median_l1=9.0,
        reference_agreement=0.9,
        clean_images=10,
        held_out=10,
        passes=1,
        seconds=1.0,
    )


def test_the_errors_of_the_index_are_named() -> None:
    said = " ".join(remarks(figures()))
    assert "index alone would accuse label 1;" in said
    assert "index alone would miss label 0." in said
    assert [row[0] for row in candidate_table(figures().labels)[1]] == ["0", "1", "2"]


def test_what_was_looked_for_is_not_said_to_be_unseen() -> None:
    plain = limits(figures())
    assert "--pairs looks for them" in plain
    assert "--silent-units looks there" in plain
    assert "--patches looks for squares" in plain
    labels, square, misled = figures().labels, patch_finding(), patch_finding(success=0.9, others=0.6)
    looked = msgspec.structs.replace(figures(), pairs=labels, silent_units=labels, patches=(square,))
    assert "--" not in limits(looked)
    assert "--patches" in limits(msgspec.structs.replace(looked, patches=(misled,)))  # which decided nothing
    assert limits(looked).endswith("change with it, and backdoors that move every label to the next.")


def test_a_pair_is_not_called_infected_for_its_label() -> None:
    """The label itself is, where another look has found it."""
    item = next(item for item in figures().labels if item.candidate and not item.infected)
    pair = msgspec.structs.replace(item, source_index=(item.label_index + 1) % 10)
    verdicts = [candidate_table([one], [item.label_index])[1][0][-1] for one in (item, pair)]
    assert verdicts[0].startswith("infected, though not by this: ")
    assert verdicts[1].startswith("clean: ")


@pytest.mark.parametrize(("name", "shown"), [(None, "3"), ("3", "3"), ("cat", "3 (cat)")])
def test_a_name_that_is_the_number_is_said_once(name: str | None, shown: str) -> None:
    assert title(msgspec.structs.replace(figures().labels[3], label=name)) == shown


def test_many_labels_are_drawn_by_size() -> None:
    many = sizes_figure(findings([float(row % 90 + 5) for row in range(90)], 1))
    assert many.startswith(b"\x89PNG")


def test_names_of_classes_are_no_formulas() -> None:
    named = [msgspec.structs.replace(item, label="$\\frac{$") for item in figures().labels]
    assert sizes_figure(named).startswith(b"\x89PNG")
