"""Model files of either kind that would do something else than compute: each is refused before it does."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from guard.errors import ModelError
from guard.predictors import load_backend
from guard.predictors.exported import ExportedBackend
from guard.predictors.screening import screen_exported, screen_torchscript
from tests.guard.models import save_exported
from tests.guard.predictors.pickles import CreatesFile, pickled
from tests.toy import ToyNet


def test_the_pickle_of_these_tests_works(owned: Path) -> None:
    torch.load(io.BytesIO(pickled(owned)), weights_only=False)
    assert owned.exists()


def test_pickled_checkpoints(tmp_path: Path, owned: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(pickled(owned))
    with pytest.raises(ModelError, match="a pickled checkpoint: nothing is unpickled here"):
        load_backend(path)
    torch.save(ToyNet().state_dict(), path)
    with pytest.raises(ModelError, match="a pickled checkpoint"):
        load_backend(path)
    path.rename(tmp_path / "checkpoint.pt2")
    with pytest.raises(ModelError, match="refused"):
        load_backend(tmp_path / "checkpoint.pt2")
    assert not owned.exists()


def test_legacy_checkpoints(tmp_path: Path, owned: Path) -> None:
    path = tmp_path / "legacy.pt"
    torch.save(CreatesFile(owned), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="no such archive or is damaged"):
        load_backend(path)
    assert not owned.exists()


SCREENS: dict[str, Callable[[Path], object]] = {"torchscript": screen_torchscript, "torch-export": screen_exported}


@pytest.mark.parametrize("kind", SCREENS)
def test_damaged_archives(kind: str, model_files: dict[str, Path], tmp_path: Path) -> None:
    data = model_files[kind].read_bytes()
    path = tmp_path / "damaged"
    for size in (0, 1, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match="no such archive or is damaged"):
            SCREENS[kind](path)
    for place in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with contextlib.suppress(ModelError):  # and nothing else
            SCREENS[kind](path)


@pytest.mark.parametrize("kind", SCREENS)
def test_archives_that_unpack_to_gigabytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(3):
            archive.writestr(f"model/code/{number}.py", bytes(30_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ModelError, match="unpacks to far more than its size"):
        SCREENS[kind](path)


@pytest.mark.parametrize("kind", SCREENS)
def test_archives_of_another_shape(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    for names in (["a.py"], ["a/code/b.py", "c/code/d.py"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        with pytest.raises(ModelError, match="without the one folder"):
            SCREENS[kind](path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ModelError):
        SCREENS[kind](path)


def test_fixed_batches_are_kept(tmp_path: Path) -> None:
    backend = ExportedBackend.load(save_exported(ToyNet(), tmp_path / "toy.pt2", batch=3))
    assert backend.batch_size == 3
