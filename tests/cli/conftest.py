"""Running `guard` in this process, as the console script does."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration import Settings, calibrate, load_images
from calibration.sources import open_model
from cli.demonstration.digits import Digits, save_exported
from cli.main import main


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object a line."""
        assert self.out or self.code != 2, self.err
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def problem(self) -> str:
        """The one line that a failed command leaves on stderr, after its progress bars."""
        assert self.code == 2
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("guard: ")
        return last


Command = Callable[..., Run]


@contextlib.contextmanager
def logging_as_it_was() -> Iterator[None]:
    """A server's command sets up the whole process's; here the next test's is not its business."""
    loggers = [logging.getLogger(name) for name in (None, "guard.requests")]
    before = [(item, item.level, item.propagate, item.handlers.copy()) for item in loggers]
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers[:] = propagate, handlers


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `guard ARGUMENTS` and returns how it ended."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["guard", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", sys.path.copy())
        capfd.readouterr()
        with logging_as_it_was(), pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        code = caught.value.code
        return Run(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run


@dataclass(frozen=True)
class Files:
    """The digits as a user has them on disk."""

    model: Path
    clean: Path
    test: Path
    triggered: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, digits: Digits, backdoored: Any) -> Files:
    """A backdoored model file, and clean, test and triggered images as `.npz`."""
    folder = tmp_path_factory.mktemp("files")
    save_exported(backdoored, digits.train.images(slice(0, 2)), folder / "model.pt2")
    for name, images in (("clean", digits.clean), ("test", digits.test), ("triggered", digits.triggered)):
        np.savez(folder / f"{name}.npz", x=images.pixels[:, 0].numpy(), y=images.known_labels.numpy())
    return Files(folder / "model.pt2", folder / "clean.npz", folder / "test.npz", folder / "triggered.npz")


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Path:
    """What `guard calibrate` makes of them."""
    return calibrated(tmp_path_factory.mktemp("calibrated"), files, Settings())


@pytest.fixture(scope="session")
def pair_profile(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Path:
    """The same with two blends, so with two detectors."""
    return calibrated(tmp_path_factory.mktemp("pair"), files, Settings(blend="logit+demeaned"))


def calibrated(folder: Path, files: Files, settings: Settings) -> Path:
    source = open_model(str(files.model), None, folder)
    calibrate(source.backend, load_images(files.clean), settings, record=source.record).save(folder / "profile", source.file)
    return folder / "profile"
