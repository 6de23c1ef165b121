from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from calibration.data import load_images
from guard import Quarantine
from guard.errors import QuarantineError
from guard.quarantine import Item


def picture(value: int = 0, channels: int = 1) -> Tensor:
    """An image that PNG holds exactly, and that tells itself from others."""
    image = torch.arange(channels * 12).reshape(channels, 3, 4) * 5
    image[0, 0, 0] = value
    return image.to(torch.float32) / 255.0


def add(quarantine: Quarantine, image: Tensor | None = None, **changes: Any) -> str | None:
    fields: dict[str, Any] = {"detector": "strip", "score": -0.01, "threshold": -0.05, "label_index": 2, "label": "cat"}
    return quarantine.add(picture() if image is None else image, **{**fields, **changes})


def sure(stored: str | None) -> str:
    assert stored is not None
    return stored


def test_what_is_stored_is_what_comes_back(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    assert quarantine.items() == []
    assert not (tmp_path / "q").exists()
    name = sure(add(quarantine, score=-0.0123456789, label="cät\n"))
    item = quarantine.get(name)
    assert quarantine.items() == [item]
    assert (item.detector, item.score, item.threshold, item.label_index) == ("strip", -0.0123456789, -0.05, 2)
    assert item.label == "cät\n"
    assert item.time == pytest.approx(int(name[:19]) / 1e9)
    assert {path.name for path in (tmp_path / "q").iterdir()} == {f"{name}.json", f"{name}.png"}


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_exact_for_every_level(channels: int, tmp_path: Path) -> None:
    image = (torch.arange(256 * channels) % 256).reshape(channels, 16, 16).to(torch.float32) / 255.0
    quarantine = Quarantine(tmp_path)
    item = quarantine.get(sure(add(quarantine, image)))
    assert item.image.endswith(".png")
    assert torch.equal(quarantine.image(item), image)
    with Image.open(tmp_path / item.image) as opened:
        assert opened.mode == ("L" if channels == 1 else "RGB")


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)),
        picture(channels=4),
        picture(channels=2),
        torch.full((1, 2, 2), 0.5),
        torch.full((3, 2, 2), float("nan")),
    ],
)
def test_what_png_would_change_is_kept_as_numbers(image: Tensor, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    item = quarantine.get(sure(add(quarantine, image)))
    assert item.image.endswith(".npy")
    assert torch.equal(quarantine.image(item).nan_to_num(7), image.nan_to_num(7))


def test_views_and_gradients_are_stored_as_they_look(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    batch = torch.stack([picture(1, 3), picture(2, 3)]).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    assert torch.equal(quarantine.image(quarantine.get(sure(add(quarantine, batch[1])))), picture(2, 3))


def test_the_oldest_leave_first_by_count(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, max_items=3)
    names = [sure(add(quarantine, picture(value))) for value in range(6)]
    assert [item.id for item in quarantine.items()] == names[3:]
    assert len(list(tmp_path.iterdir())) == 6
    assert float(quarantine.image(quarantine.items()[0])[0, 0, 0]) * 255 == pytest.approx(3)


def test_the_oldest_leave_first_by_bytes(tmp_path: Path) -> None:
    probe = Quarantine(tmp_path / "probe")
    add(probe)
    size = sum(path.stat().st_size for path in (tmp_path / "probe").iterdir())
    quarantine = Quarantine(tmp_path / "q", max_bytes=int(size * 2.5))
    names = [sure(add(quarantine, picture(value))) for value in range(5)]
    assert [item.id for item in quarantine.items()] == names[3:]
    assert sum(path.stat().st_size for path in (tmp_path / "q").iterdir()) <= size * 2.5


def test_an_image_that_is_sent_again_and_again_pushes_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path, max_items=10)
    names = [sure(add(quarantine, picture(value))) for value in range(5)]
    sent_again = torch.full((1, 3, 4), 0.3)  # kept as numbers
    names.append(sure(add(quarantine, sent_again)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: pytest.fail("nothing is written"))
        assert {add(quarantine, sent_again, score=-0.02, label=str(row)) for row in range(100)} == {names[-1]}
        assert [add(quarantine, picture(value)) for value in range(5)] == names[:5]
        assert add(Quarantine(tmp_path, max_items=10), sent_again) == names[-1]  # of another process, or after a restart
    assert [item.id for item in quarantine.items()] == names
    for value, item in enumerate(quarantine.items()[:5]):
        assert torch.equal(quarantine.image(item), picture(value))


@pytest.mark.parametrize("gone", [".json", ".png"])
def test_what_is_no_longer_there_is_stored_anew(gone: str, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    first = sure(add(quarantine))
    (tmp_path / f"{first}{gone}").unlink()
    second = sure(add(quarantine))
    assert second != first
    assert add(quarantine) == second


def test_images_of_one_digest_are_two_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chooses pixels finds pairs of so few digits soon."""
    quarantine = Quarantine(tmp_path)
    same = hashlib.sha256(b"")
    monkeypatch.setattr(hashlib, "sha256", lambda _: same)
    names = [sure(add(quarantine, picture(value))) for value in range(3)]
    assert len(set(names)) == 3
    assert [add(quarantine, picture(value)) for value in range(3)] == names


def test_only_the_servers_user_reads_it(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    for folder, mode in ((tmp_path / "above" / "q", 0o700), (tmp_path / "shared", 0o755)):
        add(Quarantine(folder))
        assert folder.stat().st_mode & 0o777 == mode
        assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]


def test_an_item_over_the_bound_is_not_stored_and_evicts_nobody(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, max_bytes=1500)
    kept = sure(add(quarantine))
    noise = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert add(quarantine, noise) is None
    assert quarantine.failures == 1
    assert [item.id for item in quarantine.items()] == [kept]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "1.json", "x.png", "0000000000000000000-0a1b2c3.json"):
        (tmp_path / name).write_text("mine")
    quarantine = Quarantine(tmp_path, max_items=1)
    for value in range(3):
        add(quarantine, picture(value))
    assert len(quarantine.items()) == 1
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "1.json").read_text() == "mine"


@pytest.mark.parametrize("bounds", [{"max_items": 0}, {"max_bytes": 0}, {"max_items": -1}])
def test_bounds_are_positive(bounds: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match="expected positive bounds"):
        Quarantine(tmp_path, **bounds)


def test_a_folder_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        quarantine = Quarantine(folder)
        assert add(quarantine) is None
        assert add(quarantine) is None
        assert quarantine.failures == 2
        assert quarantine.items() == []
    assert "could not store an image" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("fails_at", ["fsync", "replace", "scandir"])
def test_a_full_or_broken_disk_never_raises(code: int, fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path / "q", max_items=50)  # so few that it looks at all each time
    kept = sure(add(quarantine))
    calls = {"count": 0}

    def fails(*arguments: object, **options: object) -> None:
        calls["count"] += 1
        raise OSError(code, os.strerror(code))

    if fails_at == "replace":
        monkeypatch.setattr(Path, "replace", fails)
    else:
        monkeypatch.setattr(os, fails_at, fails)
    assert add(quarantine, picture(1)) is None
    monkeypatch.undo()
    assert calls["count"] == 1
    assert quarantine.failures == 1
    assert {path.name for path in (tmp_path / "q").iterdir()} == {f"{kept}.json", f"{kept}.png"}
    assert add(quarantine, picture(1)) is not None


def test_a_reader_never_sees_half_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file appears whole, and the record, which makes the item exist, appears last."""
    quarantine = Quarantine(tmp_path)
    order: list[str] = []
    real = Path.replace

    def watched(self: Path, target: Path) -> Path:
        assert self.name.startswith(".")
        assert not target.exists()
        if target.suffix == ".json":
            json.loads(self.read_bytes())
            assert target.with_suffix(".png").is_file()
        order.append(target.suffix)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    add(quarantine)
    assert order == [".png", ".json"]


def test_two_instances_share_a_folder(tmp_path: Path) -> None:
    bound = 12
    shared = [Quarantine(tmp_path, max_items=bound) for _ in range(2)]

    def fill(seed: int) -> list[str | None]:
        quarantine = shared[seed % 2]
        stored = []
        for value in range(25):
            stored.append(add(quarantine, picture((seed * 25 + value) % 200)))
            assert all(isinstance(item, Item) for item in quarantine.items())
        return stored

    with ThreadPoolExecutor(4) as pool:
        stored = [name for names in pool.map(fill, range(4)) for name in names]
    assert all(stored)
    assert shared[0].failures == shared[1].failures == 0
    items = shared[0].items()
    assert 1 <= len(items) <= bound
    assert {item.id for item in items} <= set(stored)
    for item in items:
        assert shared[1].image(item).shape == (1, 3, 4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_crash_left_is_evicted_too(tmp_path: Path) -> None:
    left = [tmp_path / f".{value:019d}-0a1b2c3d.png.part" for value in range(5)]
    for path in left:
        path.write_bytes(bytes(1000))
    orphan = tmp_path / f"{9:019d}-0a1b2c3d.png"
    orphan.write_bytes(bytes(1000))
    quarantine = Quarantine(tmp_path, max_items=3)
    for value in range(3):
        add(quarantine, picture(value))
    assert len(quarantine.items()) == 3
    assert not [path for path in (*left, orphan) if path.exists()]


def test_release_moves_the_picture(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    name, other = sure(add(quarantine, picture(1))), sure(add(quarantine, picture(2)))
    target = quarantine.release(name, tmp_path / "new" / "folder")
    assert target == tmp_path / "new" / "folder" / f"{name}.png"
    with Image.open(target) as opened:
        assert np.asarray(opened)[0, 0] == 1
    assert [item.id for item in quarantine.items()] == [other]
    assert not (tmp_path / "q" / f"{name}.png").exists()


@pytest.mark.parametrize("way", ["itself", "a link"])
@pytest.mark.parametrize("image", [picture(), torch.full((1, 3, 4), 0.3)])
def test_nothing_is_released_into_the_quarantine(image: Tensor, way: str, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    name = sure(add(quarantine, image))
    (tmp_path / "link").symlink_to("q")
    with pytest.raises(QuarantineError, match="expected a folder outside the quarantine"):
        quarantine.release(name, tmp_path / ("q" if way == "itself" else "link"))
    assert torch.equal(quarantine.image(quarantine.get(name)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_kept_as_numbers_is_released_into_a_clean_set(channels: int, tmp_path: Path) -> None:
    """Of a model calibrated with --resize every upload of another size: its pixels are no multiples of 1/255."""
    images = torch.rand(2, channels, 4, 5, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    quarantine = Quarantine(tmp_path / "q")
    for image in images:
        name = sure(add(quarantine, image))
        assert quarantine.get(name).image.endswith(".npy")
        quarantine.release(name, tmp_path / "clean" / "cat")
    for shape in (None, (channels, 4, 5)):
        loaded = load_images(tmp_path / "clean", shape)
        assert (len(loaded), loaded.class_names, loaded.skipped) == (2, ("cat",), ())
        assert float((loaded.images(slice(None)) - images).abs().max()) <= 0.5 / 255 + 1e-6
    assert list((tmp_path / "q").iterdir()) == []


UNHELD: dict[str, Tensor] = {
    "two channels": picture(channels=2),
    "four channels": picture(channels=4),
    "no channels": torch.full((4, 5), 0.5),
    "NaN": torch.full((1, 4, 5), float("nan")),
    "too bright": torch.full((1, 4, 5), 1.25),
    "too dark": torch.full((1, 4, 5), -0.3),
}


@pytest.mark.parametrize("name", UNHELD)
def test_what_no_picture_can_hold_is_not_released(name: str, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    item = quarantine.get(sure(add(quarantine, torch.full((1, 4, 5), 0.5))))
    np.save(tmp_path / "q" / item.image, UNHELD[name].numpy())
    with pytest.raises(QuarantineError, match="no PNG holds it"):
        quarantine.release(item.id, tmp_path / "clean")
    assert quarantine.items() == [item]
    assert torch.equal(quarantine.image(item).nan_to_num(7), UNHELD[name].nan_to_num(7))
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", None])
def test_numbers_that_can_not_be_read_are_not_released(data: bytes | None, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    item = quarantine.get(sure(add(quarantine, torch.full((1, 4, 5), 0.5))))
    path = tmp_path / "q" / item.image
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(QuarantineError, match="can't be read"):
        quarantine.release(item.id, tmp_path / "clean")
    assert quarantine.items() == [item]


def test_a_release_that_fails_keeps_the_item(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    name = sure(add(quarantine))
    (tmp_path / "file").write_text("")
    with pytest.raises(QuarantineError, match="could not move"):
        quarantine.release(name, tmp_path / "file")
    assert quarantine.get(name).id == name
    (tmp_path / "q" / f"{name}.png").unlink()
    with pytest.raises(QuarantineError, match="could not move"):
        quarantine.release(name, tmp_path / "elsewhere")


def test_delete(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    name = sure(add(quarantine))
    quarantine.delete(name)
    assert list(tmp_path.iterdir()) == []
    for act in (quarantine.delete, quarantine.get, lambda name: quarantine.release(name, tmp_path / "x")):
        with pytest.raises(QuarantineError, match="expected the id of an item"):
            act(name)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../../etc/passwd", "/etc/passwd", "1-a", "0" * 19 + "-0a1b2c3d\n", "0" * 19 + "-0A1B2C3D",
     "\u0660" * 19 + "-0a1b2c3d", "0" * 19 + "-0a1b2c3d/../x", "0" * 19 + "-0a1b2c3d\x00", "*"],
)  # fmt: skip
def test_ids_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q")
    add(quarantine)
    for act in (quarantine.get, quarantine.delete, lambda name: quarantine.release(name, tmp_path / "x")):
        with pytest.raises(QuarantineError, match="expected an item's id"):
            act(name)


RECORDS = {
    "empty": b"",
    "no JSON": b"\xff\x00",
    "no text": b'{"id": "\xff"}',
    "truncated": b'{"id": "',
    "another type": b"[1, 2]",
    "fields missing": b'{"id": "x"}',
}


@pytest.mark.parametrize("record", RECORDS)
def test_damaged_records_are_left_out(record: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(tmp_path)
    damaged, good = sure(add(quarantine, picture(1))), sure(add(quarantine, picture(2)))
    (tmp_path / f"{damaged}.json").write_bytes(RECORDS[record])
    assert [item.id for item in quarantine.items()] == [good]
    assert "skipped" in caplog.text
    with pytest.raises(QuarantineError, match="damaged"):
        quarantine.get(damaged)


@pytest.mark.parametrize(
    "changes",
    [{"image": "../../etc/passwd"}, {"image": "/etc/passwd"}, {"image": "other.png"}, {"id": "0" * 19 + "-0a1b2c3d"},
     {"score": None}, {"extra": 1}],
)  # fmt: skip
def test_records_that_point_elsewhere(changes: dict[str, object], tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    name = sure(add(quarantine))
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert quarantine.items() == []
    for act in (quarantine.get, lambda name: quarantine.release(name, tmp_path / "x")):
        with pytest.raises(QuarantineError):
            act(name)


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def header(shape: str, kind: str = "<f4") -> bytes:
    """The start of a `.npy` file of any shape."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


PICTURES: dict[str, tuple[str, bytes]] = {
    "empty png": (".png", b""),
    "half a png": (".png", b"\x89PNG\r\n\x1a\n"),
    "no png": (".png", b"hello"),
    "a jpeg": (".png", b"\xff\xd8\xff\xe0"),
    "a bomb": (".png", bomb()),
    "empty npy": (".npy", b""),
    "a pickle": (".npy", b"\x80\x04K\x01."),
    "an archive": (".npy", b"PK\x05\x06" + bytes(18)),
    "a huge npy": (".npy", header("(1000000000000, 3)")),
    "npy of objects": (".npy", header("(1,)", "|O") + b"\x80\x04K\x01."),
    "npy of text": (".npy", header("(1,)", "<U2") + bytes(8)),
    "no header": (".npy", b"\x93NUMPY\x01\x00\xff\xff{"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures(name: str, tmp_path: Path) -> None:
    suffix, data = PICTURES[name]
    quarantine = Quarantine(tmp_path)
    image = picture() if suffix == ".png" else torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(0))
    item = quarantine.get(sure(add(quarantine, image)))
    (tmp_path / item.image).write_bytes(data)
    with pytest.raises(QuarantineError, match="got one that can't be read"):
        quarantine.image(item)
    (tmp_path / item.image).unlink()
    with pytest.raises(QuarantineError, match="got one that can't be read"):
        quarantine.image(item)


def test_an_item_that_another_process_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path)
    name = sure(add(quarantine))
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    (tmp_path / f"{name}.json").unlink()
    with pytest.raises(QuarantineError, match="could not read"):
        quarantine.get(name)


def test_what_cannot_be_removed_is_not_called_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path / "q")
    stored = quarantine.add(torch.zeros(1, 4, 4), detector="strip", score=-0.1, threshold=-0.2)
    assert stored is not None

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(QuarantineError, match="could not remove"):
        quarantine.delete(stored)
    with pytest.raises(QuarantineError, match="could not remove"):
        quarantine.release(stored, tmp_path / "clean")


def test_what_another_process_evicts_half_written_is_stored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, evicted = Path.replace, list[str]()

    def replace(self: Path, target: Path) -> Path:
        if len(evicted) < 2:
            evicted.append(self.name)
            self.unlink()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    quarantine = Quarantine(tmp_path)
    stored = add(quarantine)
    assert len(evicted) == 2
    assert [item.id for item in quarantine.items()] == [stored]
    assert quarantine.failures == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_clock_that_was_set_back_loses_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [sure(add(Quarantine(tmp_path, max_items=3), picture(value))) for value in range(3)]
    hour_ago = time.time_ns() - 3_600_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)
    quarantine = Quarantine(tmp_path, max_items=3)
    new = [sure(add(quarantine, picture(value))) for value in (3, 4)]
    assert [item.id for item in quarantine.items()] == [old[2], *new]
    assert quarantine.items()[-1].time == pytest.approx(hour_ago / 1e9)


def test_an_item_from_the_end_of_time_stops_the_quarantine_and_no_request(tmp_path: Path) -> None:
    (tmp_path / f"{'9' * 19}-00000000.json").write_text("{}")
    quarantine = Quarantine(tmp_path)
    assert add(quarantine, picture(0)) is None
    assert quarantine.failures == 1


def test_not_every_item_costs_a_look_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine, looks, scan = Quarantine(tmp_path, max_items=500), 0, os.scandir

    def counted(folder: Path) -> Any:
        nonlocal looks
        looks += 1
        return scan(folder)

    monkeypatch.setattr(os, "scandir", counted)
    for value in range(30):
        sure(add(quarantine, picture(value)))
    assert looks < 10
    assert len(quarantine.items()) == 30
