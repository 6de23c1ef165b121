"""The images that a new version is tried with, and which of its answers will do."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from torch import Tensor

from guard import InputSpec, decode_image, load_profile
from guard.errors import GuardError, ServingError
from guard.profile import Profile, save_profile
from handlers import torchserve_trial
from handlers.torchserve_capacity import Capacity
from handlers.torchserve_rollout import roll_out
from handlers.torchserve_trial import archive_images
from tests.handlers.conftest import ASKED, SENT, WHERE, described
from tests.toy import save_toy_profile


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, dict[str, Tensor]]:
    return load_profile(save_toy_profile(tmp_path_factory.mktemp("trial") / "toy"))


def archived(folder: Path) -> Path:
    """Without what a model server needs beside."""
    path = folder.with_suffix(".mar")
    with zipfile.ZipFile(path, "w") as made:
        for item in folder.iterdir():
            made.write(item, item.name)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_they_are_the_profiles_own(channels: int, toy: tuple[Profile, dict[str, Tensor]], tmp_path: Path) -> None:
    profile, arrays = toy
    spec = InputSpec(channels=channels, height=5, width=7)
    images = torch.rand(6, channels, 5, 7)
    save_profile(msgspec.structs.replace(profile, input=spec), {**arrays, "probe.images": images}, tmp_path / "other")
    found = torch.stack([decode_image(body, spec) for body in archive_images(archived(tmp_path / "other"))])
    torch.testing.assert_close(found, images[: len(found)], atol=0.5 / 255 + 1e-6, rtol=0.0)


def test_no_file_holds_those_of_two_channels(toy: tuple[Profile, dict[str, Tensor]], tmp_path: Path) -> None:
    profile, arrays = toy
    spec = InputSpec(channels=2, height=5, width=7)
    arrays = {**arrays, "probe.images": torch.rand(6, 2, 5, 7)}
    save_profile(msgspec.structs.replace(profile, input=spec), arrays, tmp_path / "other")
    assert archive_images(archived(tmp_path / "other")) == []


def test_other_archives_have_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as made:
        made.writestr("handler.py", "")
    assert archive_images(tmp_path / "m.mar") == []
    (tmp_path / "text.mar").write_text("not an archive")
    for name, reason in (("none.mar", "No such file or directory"), (".", "Is a directory"), ("text.mar", "not one")):
        with pytest.raises(ServingError, match=f"expected a model archive, got .*: {reason}; make one with guard export"):
            archive_images(tmp_path / name)


def test_a_full_disk_is_no_missing_archive(
    toy: tuple[Profile, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(*toy, tmp_path / "other")
    archive = archived(tmp_path / "other")

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        archive_images(archive)


def test_a_damaged_profile_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as made:
        made.writestr("guard.json", "{")
        made.writestr("arrays.safetensors", "")
    with pytest.raises(GuardError, match="truncated"):
        archive_images(tmp_path / "m.mar")


def test_every_worker_of_a_new_version_gets_an_image(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["GET /models/m/2.0"] = (200, described("2.0", workers=[{"status": "READY"}] * 3))
    answers["POST /predictions/m/2.0"] = (201, b"{}")
    done = roll_out("m", "m.mar", "2.0", WHERE, images=[b"one", b"two"], capacity=Capacity(workers=3))
    assert (done.tried, SENT) == (3, [b"one", b"two", b"one"])


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (503, b'{"reason": "guard-failed"}', r"expected m 2\.0 to answer, got 503: guard-failed"),
        (400, b'{"message": "wrong size"}', r"expected m 2\.0 to answer, got 400: wrong size"),
        (500, b"", "got 500: no message"),
        (422, b"{}", "expected m 2.0 to accept clean images of its own profile, got all 2 rejected"),
    ],
)
def test_a_new_version_that_does_not_judge_an_image_is_taken_away(
    status: int, body: bytes, problem: str, answers: dict[str, tuple[int, bytes]]
) -> None:
    answers["POST /predictions/m/2.0"] = (status, body)
    with pytest.raises(ServingError, match=problem):
        roll_out("m", "m.mar", "2.0", WHERE, images=[b"one", b"two"])
    assert ASKED[-1] == "DELETE /models/m/2.0"


def test_a_first_answer_may_take_too_long(answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that a latency budget cuts off before everything is warm."""
    answers["POST /predictions/m/2.0"] = (503, b'{"reason": "out-of-time"}')
    monkeypatch.setattr(torchserve_trial, "_PAUSE_SECONDS", 1.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if seconds > 0:
            answers["POST /predictions/m/2.0"] = (200, b"{}")

    monkeypatch.setattr("handlers.torchserve_trial.time", SimpleNamespace(sleep=sleep))
    assert roll_out("m", "m.mar", "2.0", WHERE, images=[b"one", b"two"]).tried == 2
    assert SENT == [b"one", b"two", b"one", b"two"]  # each round reaches every worker, or none but one would get warm
    assert slept == [0.0, 1.0]


def test_of_a_busy_version_one_answer_may_come_too_late(
    answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([(200, b"{}"), (503, b'{"reason": "out-of-time"}'), (200, b"{}")])
    monkeypatch.setattr(torchserve_trial, "ask", lambda *_: next(given))
    assert roll_out("m", "m.mar", "2.0", WHERE, images=[b"one", b"two", b"three"]).tried == 2


def test_a_connection_that_breaks_off_is_tried_again(
    answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Iterator[ServingError | tuple[int, bytes]] = iter([ServingError("connection reset"), (200, b"{}")])

    def ask(*_: object) -> tuple[int, bytes]:
        found = next(given)
        if isinstance(found, ServingError):
            raise found
        return found

    monkeypatch.setattr(torchserve_trial, "ask", ask)
    assert roll_out("m", "m.mar", "2.0", WHERE, images=[b"one"]).tried == 1


def test_images_over_a_versions_limits_are_no_trial_of_it(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["POST /predictions/m/2.0"] = (413, b"")
    assert roll_out("m", "m.mar", "2.0", WHERE, images=[b"one"]).tried == 0
