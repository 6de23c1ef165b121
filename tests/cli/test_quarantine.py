"""`guard quarantine`: what was rejected can be looked through, released and deleted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.demonstration.digits import Digits
from guard import Quarantine
from tests.cli.conftest import Command


@pytest.fixture
def folder(tmp_path: Path, digits: Digits) -> Path:
    quarantine = Quarantine(tmp_path / "q")
    for row in range(3):
        image = digits.triggered.images(slice(row, row + 1))[0]
        assert quarantine.add(image, detector="strip", score=-0.01, threshold=-0.05, label_index=7, label="7") is not None
    return tmp_path / "q"


def test_list_and_show(guard: Command, folder: Path) -> None:
    listed = guard("quarantine", "list", folder, "--json").lines
    assert [item["label"] for item in listed] == ["7"] * 3
    shown = guard("quarantine", "show", folder, listed[1]["id"], "--json").lines[0]
    assert Path(shown["path"]).is_file()
    assert listed[2]["id"] in guard("quarantine", "list", folder).out
    assert "strip" in guard("quarantine", "show", folder, listed[0]["id"]).out


def test_release_moves_the_picture_to_its_label(guard: Command, folder: Path, tmp_path: Path, digits: Digits) -> None:
    first = Quarantine(folder).items()[0]
    run = guard("quarantine", "release", folder, first.id, "--to", tmp_path / "clean", "--label", "3")
    (picture,) = (tmp_path / "clean" / "3").iterdir()
    assert run.out.strip() == str(picture)
    assert np.array_equal(np.asarray(Image.open(picture)), digits.triggered.pixels[0, 0].numpy())
    assert len(Quarantine(folder).items()) == 2


def test_release_refuses_labels_that_leave_the_folder(guard: Command, folder: Path, tmp_path: Path) -> None:
    first = Quarantine(folder).items()[0]
    run = guard("quarantine", "release", folder, first.id, "--to", tmp_path / "clean", "--label", "../../x")
    assert "can name a folder" in run.problem
    assert len(Quarantine(folder).items()) == 3


def test_release_refuses_the_quarantine_itself(guard: Command, folder: Path) -> None:
    first = Quarantine(folder).items()[0]
    run = guard("quarantine", "release", folder, first.id, "--to", folder.parent, "--label", folder.name)
    assert "a folder outside the quarantine" in run.problem
    assert len(Quarantine(folder).items()) == 3


def test_delete_one_or_all(guard: Command, folder: Path) -> None:
    first = Quarantine(folder).items()[0]
    assert guard("quarantine", "delete", folder, first.id).out.strip() == "deleted 1"
    assert "ids of items, or --all" in guard("quarantine", "delete", folder).problem
    assert guard("quarantine", "delete", folder, "--all").out.strip() == "deleted 2"
    assert "is empty" in guard("quarantine", "list", folder).out


def test_an_id_that_is_named_twice_counts_once(guard: Command, folder: Path, tmp_path: Path) -> None:
    first, second, _ = (item.id for item in Quarantine(folder).items())
    assert guard("quarantine", "delete", folder, first, first).out.strip() == "deleted 1"
    run = guard("quarantine", "release", folder, second, second, "--to", tmp_path / "clean")
    assert (run.code, len(run.out.split())) == (0, 1)
    assert len(Quarantine(folder).items()) == 1


def test_wrong_ids_and_folders(guard: Command, folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in guard("quarantine", "list", tmp_path / "none").problem
    assert "expected an item's id" in guard("quarantine", "show", folder, "../../etc/passwd").problem
    assert "see guard quarantine list" in guard("quarantine", "show", folder, "1700000000000000000-0a1b2c3d").problem
