"""Folders that are replaced whole: what must not be lost by that."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from guard import folders
from guard.errors import RepairError
from guard.files import printable
from guard.folders import FolderKind, read_settled

KIND = FolderKind("basket's", "basket.json", lambda name: name == "apple", RepairError)


def fill(folder: Path, text: str) -> None:
    with KIND.writing(folder) as draft:
        (draft / "basket.json").write_text(text)
        (draft / "apple").write_text(text)


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "basket", "old")
    (tmp_path / "link").symlink_to(tmp_path / "basket")
    for out in (tmp_path / "basket", tmp_path / "link"):
        with pytest.raises(RepairError, match=r"a folder without what is read, got .*basket, which holds apple: pick another"):
            KIND.check_target(out, tmp_path / "other", None, tmp_path / "basket" / "apple")
    KIND.check_target(tmp_path / "basket", tmp_path / "basket" / "no such file")
    KIND.check_target(tmp_path / "basket2", tmp_path / "basket" / "apple")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is no such step")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "basket", "old")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("there would be a moment without a folder"))
    fill(tmp_path / "basket", "new")
    assert (tmp_path / "basket" / "apple").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["basket"]
    assert not folders.exchange(tmp_path / "basket", tmp_path / "none")


def test_what_is_written_lies_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "basket", "old")
    synced: list[str] = []
    real = os.fsync

    def watched(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        assert (tmp_path / "basket" / "apple").read_text() == ("new" if synced[-1] == tmp_path.name else "old")
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    fill(tmp_path / "basket", "new")
    assert (sorted(synced[:2]), synced[2:]) == (["apple", "basket.json"], ["draft", tmp_path.name])


@pytest.mark.parametrize("fails_at", ["apple", "draft"])
def test_a_disk_that_fails_and_one_that_can_not_sync_folders(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "basket", "old")

    def fails(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    if fails_at == "apple":
        with pytest.raises(RepairError, match=r"could not write the basket's to .*: Input/output error"):
            fill(tmp_path / "basket", "new")
    else:
        fill(tmp_path / "basket", "new")
    assert (tmp_path / "basket" / "apple").read_text() == ("old" if fails_at == "apple" else "new")


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path) -> None:
    for target in ("real", "nowhere"):
        (tmp_path / "real").mkdir(exist_ok=True)
        link = tmp_path / f"to-{target}"
        link.symlink_to(target)
        KIND.check_target(link)
        fill(link, target)
        assert link.is_symlink()
        assert (tmp_path / target / "apple").read_text() == target


def test_the_root_is_refused_in_one_line() -> None:
    with pytest.raises(RepairError, match=r"could not write|holds something else"):
        KIND.check_target(Path("/"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("precious")
    with pytest.raises(RepairError, match=r"a folder to write the basket's to, got .*model\.pt2, a file: pick another"):
        KIND.check_target(tmp_path / "model.pt2")


def test_what_steers_a_terminal_is_escaped_and_blanks_stay() -> None:
    assert printable("new\nline\x1b[31mred\u202e.png") == "new\\nline\\x1b[31mred\\u202e.png"
    assert printable("Screenshot 3.45\u202fPM.png") == "Screenshot 3.45\u202fPM.png"


def test_who_replaces_a_folder_again_and_again_is_waited_for(tmp_path: Path) -> None:
    """Ten times the folder is another one by the time that it was read; five were once too few."""
    folder, reads = tmp_path / "folder", 0
    folder.mkdir()

    def read() -> str:
        nonlocal reads
        reads += 1
        if reads <= 10:
            folder.rename(tmp_path / f"old-{reads}")
            folder.mkdir()
            raise RepairError("half of it")
        return "whole"

    assert read_settled(folder, read) == "whole"
