"""The images that a new version is tried with."""

from __future__ import annotations

import zipfile
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from guard import InputSpec, decode_image, load_profile
from guard.errors import GuardError, ServingError
from guard.profile import Profile, save_profile
from handlers.torchserve_trial import archive_images
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
    with pytest.raises(ServingError, match="expected a model archive"):
        archive_images(tmp_path / "none.mar")


def test_a_damaged_profile_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as made:
        made.writestr("guard.json", "{")
        made.writestr("arrays.safetensors", "")
    with pytest.raises(GuardError, match="truncated"):
        archive_images(tmp_path / "m.mar")
